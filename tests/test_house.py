"""The layout: imports go down only, no file is long, and every link of the documentation leads somewhere."""

import ast
import graphlib
import itertools
import re

import pytest
from conftest import ROOT

# A room imports from those above it in this list, and, without a circle, from its own line.
LEVELS = [
    ['conf'],
    ['measures', 'models', 'datasets'],
    ['utils'],
    ['sparsify', 'evaluation'],
    ['harness'],
    ['train', 'compress', 'coded'],
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
FILES = {
    str(path.relative_to(ROOT).with_suffix('')).replace('/', '.').removesuffix('.__init__'): path
    for folder in ('', 'conf', 'measures', 'models', 'harness')
    for path in sorted((ROOT / folder).glob('*.py'))
}
PAGES = sorted(
    path.relative_to(ROOT) for folder in ('', 'docs') for path in (ROOT / folder).glob('*.md')
)


def imports(name):
    """The files of the repository that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{name}: a relative import'
            members = {f'{node.module}.{alias.name}' for alias in node.names}
            found |= (members & set(FILES)) | ({node.module} if members - set(FILES) else set())
    return found & set(FILES)


def room(name):
    return name.partition('.')[0]


def test_every_file_has_its_room():
    assert {room(name) for name in FILES} == set(LEVEL)
    assert imports('launch') >= {'conf', 'records', 'figures'} and imports('conf') == set()


@pytest.mark.parametrize('name', FILES)
def test_imports_go_down(name):
    up = {other for other in imports(name) if LEVEL[room(other)] > LEVEL[room(name)]}
    assert not up, f'{name} imports {up}'


def test_imports_go_round_in_no_circle():
    graphlib.TopologicalSorter(
        {name: imports(name) for name in FILES}
    ).prepare()  # a CycleError names the circle


def test_measures_know_networks_and_tensors_alone():
    for name in FILES:
        if room(name) == 'measures':
            allowed = {other for other in FILES if room(other) == 'measures'} | {
                'conf',
                'models.weight_norm',
            }
            assert imports(name) <= allowed
            others = {alias.name for node in ast.walk(ast.parse(FILES[name].read_text()))
                      if isinstance(node, ast.ImportFrom) and node.module == 'conf' for alias in node.names}  # fmt: skip
            assert others <= {'BadInput'}


@pytest.mark.parametrize('name', FILES)
def test_no_file_is_long(name):
    assert len(FILES[name].read_text().splitlines()) <= 410


@pytest.mark.pages
def test_the_readme_is_short():
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 95 and len(text.split()) <= 800


def anchors(text):
    """The fragments by which the headings of a page are linked."""
    headings = re.findall(r'^#+ (.*)$', re.sub(r'```.*?```', '', text, flags=re.S), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.pages
@pytest.mark.parametrize('page', PAGES, ids=str)
def test_links_lead_somewhere(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', (ROOT / page).read_text()):
        if not link.startswith(('https:', 'http:', 'mailto:')):
            path, _, fragment = link.partition('#')
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), f'{page}: {link}'
            assert not fragment or fragment in anchors(target.read_text()), f'{page}: {link}'


@pytest.mark.pages
@pytest.mark.parametrize('page', PAGES, ids=str)
def test_tables_have_the_columns_of_their_header(page):
    lines = [re.sub(r'\\\||`[^`]*`', '', line) for line in (ROOT / page).read_text().splitlines()]
    for header, line in itertools.pairwise(lines):
        if line.startswith('|') and header.startswith('|'):
            assert line.count('|') == header.count('|'), f'{page}: {line}'


@pytest.mark.pages
def test_every_page_is_linked():
    """From README.md, directly or over other pages."""
    seen, left = set(), [ROOT / 'README.md']
    while left:
        page = left.pop().resolve()
        if page not in seen:
            seen.add(page)
            links = re.findall(r'\]\(([^)\s#]+\.md)', page.read_text())
            left += [page.parent / link for link in links if (page.parent / link).exists()]
    assert {(ROOT / page).resolve() for page in PAGES} <= seen
