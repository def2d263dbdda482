"""The layout: imports go down only, and every link of the documentation leads somewhere."""

import ast
import graphlib
import itertools
import re

import pytest
from conftest import ROOT

from conf import KNOBS

# A file imports from files above it in this list, and, without a circle, from its own line.
LEVELS = [
    ['conf'],
    ['measures', 'models'],
    ['datasets', 'device', 'utils'],
    ['sparsify', 'evaluation'],
    ['records'],
    ['figures'],
    ['train'],
    ['studies'],
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
FILES = {}
for folder in ('.', 'conf', 'measures', 'models', 'studies', 'studies/compress', 'studies/coded'):
    for path in sorted((ROOT / folder).glob('*.py')):
        module = str(path.relative_to(ROOT).with_suffix('')).replace('/', '.')
        FILES[module.removesuffix('.__init__')] = path
PAGES = [path.relative_to(ROOT) for path in (*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'))]


def imports(name):
    """The files of the repository that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f'{node.module}.{alias.name}' for alias in node.names}
            found |= members & set(FILES)
            if members - set(FILES):
                found.add(node.module)
    return found & set(FILES)


def level(name):
    return LEVEL[name.partition('.')[0]]


def test_the_list_of_levels_is_complete():
    assert {name.partition('.')[0] for name in FILES} - {'recipes'} == set(LEVEL)


def test_imports_go_down():
    for name in FILES:
        up = {other for other in imports(name) if level(other) > level(name)}
        assert not up, f'{name} imports {up}'


def test_imports_go_round_in_no_circle():
    circles = {name: imports(name) - {name} for name in FILES}
    graphlib.TopologicalSorter(circles).prepare()  # a CycleError names the circle


def test_measures_know_neither_settings_nor_files():
    for name in FILES:
        if name.startswith('measures'):
            others = {other for other in imports(name) if not other.startswith('measures')}
            assert others <= {'conf', 'models.weight_norm'}, name
            assert 'load_settings' not in FILES[name].read_text()


# ------------------------------------------------------------------------------------------------
# Pages
# ------------------------------------------------------------------------------------------------


def anchors(text):
    """The fragments by which the headings of a page are linked."""
    headings = re.findall(r'^#+ (.*)$', re.sub(r'```.*?```', '', text, flags=re.S), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=str)
def test_links_lead_somewhere(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', (ROOT / page).read_text()):
        if link.startswith(('https:', 'http:', 'mailto:')):
            continue
        path, _, fragment = link.partition('#')
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f'{page}: {link}'
        assert not fragment or fragment in anchors(target.read_text()), f'{page}: {link}'


@pytest.mark.parametrize('page', PAGES, ids=str)
def test_tables_have_the_columns_of_their_header(page):
    lines = [re.sub(r'\\\||`[^`]*`', '', line) for line in (ROOT / page).read_text().splitlines()]
    for header, line in itertools.pairwise(lines):
        if line.startswith('|') and header.startswith('|'):
            assert line.count('|') == header.count('|'), f'{page}: {line}'


def test_every_page_is_linked():
    """From README.md, directly or over other pages."""
    seen, waiting = set(), [ROOT / 'README.md']
    while waiting:
        page = waiting.pop().resolve()
        if page in seen:
            continue
        seen.add(page)
        links = re.findall(r'\]\(([^)\s#]+\.md)', page.read_text())
        waiting += [page.parent / link for link in links if (page.parent / link).exists()]
    assert {(ROOT / page).resolve() for page in PAGES} <= seen


@pytest.mark.parametrize('page', PAGES, ids=str)
def test_the_programs_and_options_that_pages_name_exist(page):
    text = (ROOT / page).read_text()
    for path, line in re.findall(r'python ([\w/]+\.py)([^`\n]*)', text):
        assert (ROOT / path).exists(), f'{page}: {path}'
        if path == 'train.py':
            knobs = {f'--{name.replace("_", "-")}' for name in KNOBS}
            check_options(page, line, ['conf'], knobs)
    for study, line in re.findall(r'python -m studies\.([\w.]*\w)([^`\n]*)', text):
        name = f'studies.{study}'
        assert name in FILES, f'{page}: {name}'
        check_options(page, line, [name, f'{name}.__main__', 'studies.report'], set())


def check_options(page, line, modules, known):
    """The options in a line of a page are `known`, or a parser in one of these modules has them."""
    for name in modules:
        if name in FILES:
            known = known | set(re.findall(r"'(--[\w-]+)'", FILES[name].read_text()))
    unknown = set(re.findall(r'(?<!\S)--[\w-]+', line)) - known
    assert not unknown, f'{page}: {unknown} in {line}'
