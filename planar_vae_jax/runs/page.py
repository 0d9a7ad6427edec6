"""``report.html``, the page of a run: one file without scripts that needs nothing beside it.

The page knows no experiment: any ``summary.json`` becomes figures with their errors and tables, any ``metrics.jsonl``
becomes curves. ``RunFolder.finish`` writes it.
"""

import base64
import html
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from planar_vae_jax.runs._charts import line_chart
from planar_vae_jax.runs.config import as_json, shown
from planar_vae_jax.statistics import Table, with_error

_SPLITS = ("train", "test", "validation", "valid")  # figures of these splits share a chart: train_loss, test_loss
_LONGEST = 1000  # rows of a table, entries of a list


class Link(NamedTuple):
    """A cell of a table, or a fact, that leads elsewhere."""

    text: str
    address: str  # relative to the page


class Picture(NamedTuple):
    """A picture on the page."""

    name: str  # of its file
    png: bytes
    title: str  # says what the picture shows


class Setting(NamedTuple):
    """A flag of the run."""

    name: str
    value: Any  # as JSON holds it
    default: Any
    help: str


class _Figure(NamedTuple):
    name: str
    text: str


class _Figures(NamedTuple):
    """Figures below one heading: numbers with their errors, and tables."""

    title: str  # "": those of the summary itself
    numbers: list[_Figure]
    tables: list[Table]


def render(
    *,
    title: str,
    command: Sequence[str],
    facts: Mapping[str, Any],
    settings: Sequence[Setting],
    summary: Mapping[str, Any],
    tables: Mapping[str, Sequence[Table]],
    lines: Sequence[Mapping[str, Any]],
    pictures: Sequence[Picture],
    usage: str,
) -> str:
    """Returns the page as HTML.

    Args:
        title: the name of the run.
        command: the words of the command that repeats the run; none: unknown.
        facts: more about the run, name -> text; its data, its device and its time stand at the top too.
        settings: every flag.
        summary: the content of ``summary.json``, as it is read. ``NAME_se`` is the standard error of ``NAME``.
        tables: tables that take the place of entries of the summary, by the entry's name.
        lines: the lines of ``metrics.jsonl``, each with ``"epoch"`` or ``"step"``.
        pictures: in their order on the page.
        usage: Python code that loads the run.
    """
    known = {setting.name: as_json(setting.value) for setting in settings}
    more, figures = _sorted(summary, tables, known)
    sections = {
        "Figures": _figures(figures),
        "Curves": _curves(lines),
        "Pictures": "".join(map(_picture, pictures)),
        "Use": f'<pre tabindex="0"><code>{_text(usage)}</code></pre>',
        "Settings": _settings(settings),
        "Data, device and time": _facts({**facts, **more}),
    }
    sections = {name: content for name, content in sections.items() if content}
    address = {name: name.split(",")[0].lower() for name in sections}
    contents = "".join(f'<a href="#{address[name]}">{_text(name)}</a> ' for name in sections)
    body = "".join(
        f'<section id="{address[name]}"><h2>{_text(name)}</h2>{content}</section>' for name, content in sections.items()
    )
    lead = ", ".join(str(facts[name]) for name in ("data", "device", "time") if name in facts)
    ran = "".join(f"<span>{_text(word)}</span> " for word in command)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{_text(title)}</h1>
<p class="note">{_text(lead)}</p>
{ran and f'<pre class="command"><code>{ran.strip()}</code></pre>'}
<nav>{contents.strip()}</nav>
</header>
{body}
</main>
</body>
</html>
"""


def _text(value: Any) -> str:
    return html.escape(str(value))


# --- The summary


def _sorted(
    summary: Mapping[str, Any], tables: Mapping[str, Sequence[Table]], known: Mapping[str, Any]
) -> tuple[dict[str, str], list[_Figures]]:
    """Returns the facts of a summary, and its figures below their headings.

    Args:
        summary: see :func:`render`.
        tables: see :func:`render`.
        known: facts that the page shows elsewhere.
    """
    facts, own, groups = {}, _Figures("", [], []), []
    for name, value in _without_errors(summary).items():
        heading = _heading(name)
        if name in tables:
            groups.append(_Figures("", [], list(tables[name])))
        elif isinstance(value, Mapping) and value and all(isinstance(row, Mapping) for row in value.values()):
            groups.append(_Figures("", [], [_table(heading, value)]))
        elif _is_rows(value):
            groups.append(_Figures("", [], [_table(heading, dict(enumerate(value)))]))
        elif isinstance(value, Mapping):
            groups.append(_group(heading, value, summary.get(f"{name}_se")))
        elif _is_figure(name, value, summary) and name not in known:
            own.numbers.append(_Figure(_words(name), _number(value, summary.get(f"{name}_se"))))
        elif name not in known or known[name] != value:
            facts[_words(name)] = _number(value)
    return facts, [own, *groups]


def _is_figure(name: str, value: Any, summary: Mapping[str, Any]) -> bool:
    return f"{name}_se" in summary or (isinstance(value, float) and not name.startswith("seconds"))


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _without_errors(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries without standard errors, which are shown beside their figures."""
    errors = {f"{name}_se" for name in figures}
    return {name: value for name, value in figures.items() if name not in errors}


def _group(heading: str, figures: Mapping[str, Any], errors: Any) -> _Figures:
    """Returns a dict of figures; lists of one length become the columns of a table."""
    errors = errors if isinstance(errors, Mapping) else {}
    numbers, columns = [], {}
    for name, value in _without_errors(figures).items():
        if isinstance(value, list) and len(value) > 1:
            columns[_words(name)] = value
        else:
            numbers.append(_Figure(_words(name), _number(value, figures.get(f"{name}_se", errors.get(name)))))
    tables = []
    for length in dict.fromkeys(map(len, columns.values())):
        of_length = {name: values for name, values in columns.items() if len(values) == length}
        rows = [[number, *map(_number, row)] for number, row in enumerate(zip(*of_length.values(), strict=True))]
        tables.append(Table("", [["no.", *of_length], *rows]))
    return _Figures(heading, numbers, tables)


def _table(title: str, rows: Mapping[Any, Mapping[str, Any]]) -> Table:
    """Returns a dict of dicts as a table: a line for each, a column for each figure."""
    names = list(dict.fromkeys(name for row in rows.values() for name in _without_errors(row)))
    cells = [[label, *(_number(row.get(name), row.get(f"{name}_se")) for name in names)] for label, row in rows.items()]
    return Table(title, [["", *map(_words, names)], *cells])


def _number(value: Any, error: Any = None) -> str:
    """Returns a value of the summary as text: a number with its error, if it has one."""
    if isinstance(error, int | float) or isinstance(value, float):
        return with_error(value, error)
    if isinstance(value, list):
        more = f", ... ({len(value)}; all in summary.json)" if len(value) > _LONGEST else ""
        return ", ".join(map(_number, value[:_LONGEST])) + more
    return "-" if value is None else str(value)


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _heading(name: str) -> str:
    words = _words(name)
    return words[:1].upper() + words[1:]


# --- Sections


def _figures(groups: Sequence[_Figures]) -> str:
    parts = []
    for group in groups:
        if group.title:
            parts.append(f"<h3>{_text(group.title)}</h3>")
        if group.numbers:
            numbers = (f"<div><dt>{_text(name)}</dt><dd>{_text(text)}</dd></div>" for name, text in group.numbers)
            parts.append(f'<dl class="numbers">{"".join(numbers)}</dl>')
        if group.tables:
            parts.append(f'<div class="tables">{"".join(_scrolled(one, group.title) for one in group.tables)}</div>')
    if any("±" in text for group in groups for _, text in group.numbers):
        parts.insert(0, '<p class="note">± is the standard error, unless a table says otherwise.</p>')
    return "".join(parts)


def _scrolled(table: Table, name: str = "") -> str:
    """Returns a table that scrolls inside a box of the page's width."""
    head, *rows = table.rows
    cells = "".join(f'<th scope="col">{_cell(cell)}</th>' if cell else "<td></td>" for cell in head)
    body = "".join(
        f'<tr><th scope="row">{_cell(row[0])}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows[:_LONGEST]
    )
    left_out = f'<p class="note">{len(rows) - _LONGEST} more rows are in summary.json.</p>' * (len(rows) > _LONGEST)
    heading = f"<h3>{_text(table.title)}</h3>" if table.title else ""
    label = _text(table.title or name or "table")
    return (
        f'<div>{heading}<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
        f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>{left_out}</div>"
    )


def _cell(cell: Any) -> str:
    if isinstance(cell, Link):
        return f'<a href="{_text(cell.address)}">{_text(cell.text)}</a>'
    return _text(cell)


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns a chart for each figure of the metrics; a figure of several splits has one chart."""
    unit = "step" if any("step" in line for line in lines) else "epoch"
    lines = [line for line in lines if unit in line]  # one that was lost is {}
    names = dict.fromkeys(name for line in lines for name, value in line.items() if isinstance(value, int | float))
    charts: dict[str, list[str]] = {}
    for name in names:
        if name in (unit, "seconds") or name.startswith("first_") or name.endswith("_se"):
            continue
        split, _, figure = name.partition("_")
        charts.setdefault(figure if split in _SPLITS and figure else name, []).append(name)
    drawn = "".join(_chart(*chart, lines, unit) for chart in charts.items())
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _chart(heading: str, names: Sequence[str], lines: Sequence[Mapping[str, Any]], unit: str) -> str:
    xs = [line[unit] for line in lines]
    ys = {name: [line.get(name) for line in lines] for name in names}
    last = [f"{_words(name)} {with_error(lines[-1].get(name), lines[-1].get(f'{name}_se'))}" for name in names]
    keys = "".join(f'<span class="key{number % 3}">{_text(key)}</span> ' for number, key in enumerate(last))
    title = f"{_words(heading)} by {unit}; at the end {', '.join(last)}"
    chart = line_chart(title, unit, {name: (xs, values) for name, values in ys.items()})
    return f"<figure><figcaption>{keys}</figcaption>{chart}</figure>"


def _picture(picture: Picture) -> str:
    width, height = struct.unpack(">II", picture.png[16:24])
    title = " ".join(picture.title.split())
    data = base64.b64encode(picture.png).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{_text(title or picture.name)}"'
    return (
        f'<figure class="picture"><div class="card"><div style="min-width:min({width}px,30rem)">'
        f'{image} width="{width}" height="{height}"></div></div><figcaption>{_text(picture.name)}</figcaption></figure>'
    )


def _settings(settings: Sequence[Setting]) -> str:
    """Returns a table of the flags; those that differ from their defaults come first and stand out."""
    rows = []
    for setting in sorted(settings, key=lambda setting: setting.value == setting.default):
        differs = setting.value != setting.default
        value, default = ("-" if one is None else shown(one) for one in (setting.value, setting.default))
        rows.append(
            f'<tr{" class=differs" * differs}><th scope="row">--{_text(setting.name)}</th><td>{_text(value)}</td>'
            f"<td>{_text(default) if differs else ''}</td><td>{_text(setting.help)}</td></tr>"
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("flag", "value", "default", "meaning"))
    return (
        '<p class="note">Flags that differ from their defaults come first, in bold.</p>'
        '<div class="scroll settings" role="region" tabindex="0" aria-label="Settings">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_cell(value)}</dd>" for name, value in facts.items())
    return f'<dl class="facts">{rows}</dl>' if rows else ""


_STYLE = """
:root { color-scheme: light dark; --page: #fdfcfa; --text: #1d1c1a; --soft: #625e57; --rule: #ddd8cf; --fill: #f4f1ea;
  --line0: #1b6497; --line1: #b1541a; --line2: #5b7a26; }
@media (prefers-color-scheme: dark) {
  :root { --page: #17181a; --text: #e5e2dc; --soft: #a39e95; --rule: #35373b; --fill: #202225;
    --line0: #83b9e2; --line1: #eda56f; --line2: #a9c86c; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1, h2, h3, p, dt, dd, figcaption { overflow-wrap: anywhere; }
h1 { margin: 0 0 .5rem; font-size: clamp(1.5rem, 1.2rem + 1.6vw, 2.25rem); font-weight: 600; line-height: 1.2; }
h2 { margin: 3rem 0 1rem; padding-top: 1rem; border-top: 1px solid var(--rule); font-size: 1.3rem; font-weight: 600; }
header .note { margin-bottom: 1.25rem; }
h3 { margin: 2rem 0 .5rem; max-width: 44rem; font-size: 1rem; font-weight: 600; }
a { color: var(--line0); text-underline-offset: .15em; }
:focus-visible { outline: 2px solid var(--line0); outline-offset: 2px; }
.note, figcaption { margin: 0 0 .25rem; color: var(--soft); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: 1.25rem; }
pre { margin: 0; padding: .75rem 1rem; border-radius: .375rem; background: var(--fill); overflow-x: auto;
  font: .875rem/1.5 ui-monospace, monospace; }
.command code { white-space: normal; }
.command span { display: inline-block; max-width: 100%; word-break: break-all; }
.charts figcaption span { display: inline-block; }
dl { margin: 0; }
dt { color: var(--soft); font-size: .875rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.numbers { display: flex; flex-wrap: wrap; gap: .75rem 1.5rem; }
.numbers > div { min-width: 8rem; max-width: 100%; }
.numbers dd { font-size: 1.0625rem; overflow-wrap: anywhere; }
.note + .numbers { margin-top: 1rem; }
.facts { display: grid; grid-template-columns: minmax(7rem, max-content) minmax(0, 1fr); gap: .25rem 1.5rem; }
.scroll { max-height: 32rem; overflow: auto; border-bottom: 1px solid var(--rule); }
.tables { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 0 2rem; }
.tables > div { max-width: 100%; }
.tables h3, .tables .note { width: 0; min-width: 100%; }  /* the table alone says how wide it is */
.numbers + .tables { margin-top: 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.25rem .3rem 0; text-align: right; white-space: nowrap; font-weight: 400; }
thead th, thead td { position: sticky; top: 0; background: var(--page); color: var(--soft); vertical-align: bottom;
  box-shadow: inset 0 -1px var(--rule); }
th:first-child { text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
.settings { max-height: none; }
.settings table { width: 100%; color: var(--soft); }
.settings th, .settings td { text-align: left; vertical-align: top; }
.settings td { white-space: normal; overflow-wrap: anywhere; }
.settings td:last-child { width: 60%; padding-right: 0; }
.settings .differs { color: var(--text); }
.settings .differs th, .settings .differs td:nth-child(2) { font-weight: 600; }
figure { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); gap: 1.5rem; }
.charts figcaption span { margin-right: .75rem; color: var(--text); }
.charts figcaption span::before { content: ""; display: inline-block; width: .9em; height: .2em; margin-right: .4em;
  vertical-align: middle; background: var(--line0); }
.charts .key1::before { background: var(--line1); }
.charts .key2::before { background: var(--line2); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 13px; }
.grid { stroke: var(--rule); }
.line0, .line1, .line2 { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke: var(--line0); }
.line1 { stroke: var(--line1); }
.line2 { stroke: var(--line2); }
.dot0 { fill: var(--line0); }
.dot1 { fill: var(--line1); }
.dot2 { fill: var(--line2); }
.picture { margin: 0 0 1.75rem; }
.card { overflow-x: auto; padding: .75rem; border: 1px solid var(--rule); border-radius: .375rem; background: #fff; }
.card img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.picture figcaption { margin-top: .35rem; }
@media (min-width: 40.01rem) { .settings td:nth-child(-n+3) { min-width: 8rem; } }
@media (max-width: 40rem) {
  .facts, .settings table, .settings tbody { display: block; }
  .facts dd { margin-bottom: .6rem; }
  .settings thead { display: none; }
  .settings tr { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 0 1rem;
    padding: .4rem 0; }
  .settings th, .settings td { padding: 0; white-space: normal; overflow-wrap: anywhere; }
  .settings td:nth-child(3):empty { display: none; }
  .settings td:nth-child(3) { grid-column: 2; }
  .settings td:nth-child(3)::before { content: "default: "; }
  .settings td:last-child { grid-column: 1 / -1; width: auto; }
}
@media print {
  :root { color-scheme: light; --page: #fff; --text: #000; --soft: #444; --rule: #bbb; --fill: #f4f4f4;
    --line0: #1b6497; --line1: #b1541a; --line2: #5b7a26; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .scroll, .card, pre { max-height: none; overflow: visible; }
  pre { white-space: pre-wrap; }
  table { font-size: .7rem; }
  th, td { padding-right: .6rem; white-space: normal; }
  thead th, thead td { position: static; }
  tr, figure, .numbers > div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
