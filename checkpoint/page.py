"""Pages for people: one HTML file that loads nothing and runs nothing, with its tables and inline figures.

Everything that comes from a report is escaped; a page forbids itself scripts and connections besides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

WIDTH = 960  # of a figure, in its own units
_UNPRINTABLE = re.compile(r"[^\t\n\x20-\x7e\xa0-\U0010ffff]")


def page(title: str, content: str, style: str = "") -> bytes:
    """A self-contained HTML5 page in UTF-8; style: CSS in addition to the common one."""
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
{content}</main>
</body>
</html>
"""
    return text.encode("utf-8", "replace")


def escaped(value: object) -> str:
    """Text for elements and quoted attributes; what HTML cannot hold becomes U+FFFD."""
    return escape(_UNPRINTABLE.sub("\ufffd", str(value).encode("utf-8", "replace").decode()))


def section(title: str, content: str) -> str:
    """A part of a page with its heading."""
    return f"<section>\n<h2>{escaped(title)}</h2>\n{content}</section>\n"


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what they stand for."""
    return (
        f"<dl class=facts>{''.join(f'<dt>{escaped(key)}</dt><dd>{escaped(value)}</dd>' for key, value in rows)}</dl>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], label: str, style: str = "") -> str:
    """A table of text; the first cell of a row names it."""
    heads = "".join(f"<th scope=col>{escaped(cell)}</th>" if cell else "<td></td>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{escaped(row[0])}</th>{''.join(f'<td>{escaped(cell)}</td>' for cell in row[1:])}</tr>\n"
        for row in rows
    )
    whole = f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    return f'<div class="scroll {style}" tabindex=0 role=region aria-label="{label}">{whole}</div>\n'


def svg(parts: Iterable[str], height: int, label: str) -> str:
    """A drawing that is WIDTH wide, as an element of a page."""
    start = f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escaped(label)}">'
    return "\n".join([start, *parts, "</svg>"])


def figure(drawing: str) -> str:
    """A drawing in its place: where a screen is narrower it can be scrolled."""
    return f"<div class=scroll tabindex=0>{drawing}</div>\n"


STYLE = """
:root{color-scheme:light dark;--page:#fcfcfb;--card:#f4f4f1;--ink:#16171a;--soft:#55585f;--line:#dcdcd6;--rule:#8b8d92;
--accent:#1f5fae;--mark:#ffe2a8}
@media(prefers-color-scheme:dark){:root{--page:#17181b;--card:#202226;--ink:#ececea;--soft:#a9acb3;--line:#35373d;
--rule:#7c7f87;--accent:#8bb8f0;--mark:#5f4a12}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1040px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.1rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:0 0 .6rem}
h3{font-size:1rem;margin:0;font-weight:600;overflow-wrap:anywhere}
h4{font-size:.78rem;margin:0 0 .25rem;color:var(--soft);font-weight:600}
p{margin:.2rem 0 .8rem}
section{margin-top:2.6rem}
.eyebrow,.verdict,.note,section>p{color:var(--soft)}
.eyebrow{margin:0;font-size:.9rem}
.note{font-size:.85rem}
.lead{font-size:1.05rem;margin:0 0 .6rem}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.25rem 1rem;margin:0 0 1.2rem;font-size:.92rem}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
.scroll+p{margin-top:1.2rem}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.38rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th,thead td{border-bottom:1px solid var(--rule);color:var(--soft);font-weight:600}
th:first-child,td:first-child{text-align:left;padding-left:0}
th:last-child,td:last-child{padding-right:0}
tbody th{font-weight:500}
.headline{margin-top:1rem}
.headline table{font-size:1.02rem}
.headline td:nth-child(3){font-weight:650}
.headline td:last-child{white-space:normal;color:var(--soft);font-size:.9rem;text-align:left;padding-left:1.2rem}
.headline th:last-child{text-align:left;padding-left:1.2rem}
.words td,.words thead th{text-align:left;white-space:normal}
pre{margin:0;padding:.9rem 1rem;background:var(--card);border:1px solid var(--line);border-radius:8px;
font:.88rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-x:auto;user-select:all}
pre span{white-space:pre}
.chart{display:block;width:100%;min-width:640px;height:auto}
.grid{stroke:var(--line)}
.base{stroke:var(--rule)}
.tick,.axis{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}
.axis{font-size:13px}
.mark{stroke:var(--page);stroke-width:1}
.mark:hover{stroke:var(--ink);stroke-width:2}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;list-style:none;margin:0 0 .6rem;padding:0;font-size:.9rem}
.legend li{display:flex;align-items:center;gap:.45rem}
.key{width:16px;height:16px}
summary{cursor:pointer;color:var(--accent);padding:.3rem 0}
details dl{margin-top:.6rem}
:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
@media(max-width:640px){main{padding:1.5rem 1rem 3rem}th,td{padding:.38rem .45rem}.headline table{font-size:.86rem}
.headline th{white-space:normal}.headline td:last-child,.headline th:last-child{font-size:.78rem;padding-left:.45rem}}
@media print{body{background:#fff}section,article{break-inside:avoid}}
"""
