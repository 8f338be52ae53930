"""How the gallery looks: theme, style sheet, and the small pieces of HTML that pages are made of.

Colours keep a contrast of at least 4.5 to 1 in light and dark. Fonts are the system's, so a page asks nobody else for
anything. Every piece escapes what it is given.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmoe.errors import MmoeError
from zoo.table import short, shorten

if TYPE_CHECKING:
    from PIL import Image

    from zoo.card import Card

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
NO_RESULT = "no result yet"  # shown by an output of labels before its first run
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
CODE = re.compile(r"\S+$|(mmoe|pip|hf|python\S*|wget|curl|chmod|unzip)\s|--|[\w.]*[=({\[]")  # how a line of code begins
INTO_VIEW = "?.scrollIntoView({behavior: 'smooth', block: 'nearest'})"


def theme() -> gr.Theme:
    """Blue on slate, with system fonts."""
    base = gr.themes.Default(
        primary_hue="blue", secondary_hue="blue", neutral_hue="slate", radius_size="md", font=FONT, font_mono=MONO
    )
    return base.set(
        button_primary_background_fill="#1d4ed8",
        button_primary_background_fill_hover="#1e40af",
        button_primary_background_fill_dark="#1d4ed8",
        button_primary_background_fill_hover_dark="#2563eb",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        color_accent="#1d4ed8",
        body_text_color_subdued="#475569",
        body_text_color_subdued_dark="#a8b4c6",
        block_info_text_color="#475569",
        block_info_text_color_dark="#a8b4c6",
        block_title_text_color="#334155",
        block_title_text_color_dark="#e2e8f0",
        block_label_text_color="#334155",
        block_label_text_color_dark="#e2e8f0",
        input_placeholder_color="#5b6779",
        input_placeholder_color_dark="#94a3b8",
        checkbox_border_color="#64748b",
        checkbox_border_color_dark="#94a3b8",
        link_text_color="#1d4ed8",
        link_text_color_dark="#93c5fd",
    )


CSS = """
.dark { --color-accent: #7db3fd; }
.gradio-container { width: 100% !important; max-width: min(1240px, 100%) !important; min-width: 0 !important;
  margin: 0 auto; box-sizing: border-box; }
.or, .upload-text .or { color: var(--body-text-color-subdued) !important; }
footer .divider { display: none !important; }
footer, footer a, footer button { color: var(--body-text-color-subdued) !important; }
:is(button, a, input, textarea, [role=tab], [tabindex]):focus-visible {
  outline: 2px solid var(--color-accent) !important; outline-offset: 2px; }
.error-area:not(:has(.error-card)), .once-filled:not(:has(td)) { display: none !important; }
.if-filled:not(:has(img)) { display: none !important; }
.switching:not(:has(input)) > button { display: none; }
.switching > .block:not(:has(input)):not(:has(.pending)) { display: none; }
.panel-head .html-container.pending, .switching .html-container.pending { min-height: 76px; }
body:has(.page-head.dense) .for-experts, body:not(:has(.page-head.dense)) .for-dense { display: none !important; }
.error-card { border: 1px solid #b45309; border-left-width: 5px; border-radius: 8px; padding: 10px 14px;
  background: #fffbeb; color: #451a03; overflow-wrap: anywhere; }
.error-card strong { color: inherit; }
.error-card pre { margin: 4px 0 0; white-space: pre-wrap; font: inherit; color: inherit; background: none; }
.error-card code { color: inherit; background: #fef3c7; padding: 1px 5px; border-radius: 4px; }
.dark .error-card { background: #2b1d07; color: #fde9c8; border-color: #d97706; }
.dark .error-card code { background: #45300c; }
.page-head h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 2px; overflow-wrap: anywhere; }
.page-head p { margin: 0 0 8px; color: var(--body-text-color-subdued); max-width: 75ch; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; }
.chip { font-size: .8rem; line-height: 1.5; padding: 1px 9px; border-radius: 999px; white-space: nowrap;
  background: #e2e8f0; color: #1e293b; }
.chip.good { background: #d1fae5; color: #064e3b; }
.chip.warn { background: #fef3c7; color: #78350f; }
.dark .chip { background: #334155; color: #f1f5f9; }
.dark .chip.good { background: #064e3b; color: #d1fae5; }
.dark .chip.warn { background: #5b3a06; color: #fef3c7; }
.hint p { margin: 0; overflow-wrap: anywhere; font-size: .875rem !important;
  color: var(--body-text-color-subdued) !important; }
.html-container.pending .hint { visibility: hidden; }
.section h2 { font-size: 1.1rem; margin: 2px 0 2px; }
.section p { margin: 0; color: var(--body-text-color-subdued); }
.brand { display: flex; align-items: center; justify-content: space-between; font-weight: 700; font-size: 1.15rem; }
.brand button { font: inherit; font-size: .875rem; font-weight: 500; padding: 5px 14px; border-radius: 8px;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary); color: inherit; }
.layout { flex-wrap: nowrap !important; gap: 24px; align-items: flex-start; }
.side { position: sticky; top: 12px; width: 260px; flex: none !important; }
.main { min-width: 0 !important; }
@media (min-width: 900px) {
  .brand button { display: none; }
  .card-text td:nth-child(-n + 2) { white-space: nowrap; }
}
@media (max-width: 899.9px) {
  .layout { flex-direction: column; gap: 10px; }
  .side { position: static; width: 100%; padding-bottom: 4px; }
  .main { width: 100%; }
  #models:not(.open) { display: none; }
  .panel-head { flex-direction: column; gap: 8px; }
  .card-text pre { padding-top: 34px !important; }
}
:is(.captioned, .captioned > .wrapper) > label[data-testid=block-label] { position: static !important; border: 0;
  border-radius: 0; width: 100%; background: none; padding: 7px 10px; box-shadow: none; }
.captioned .matplotlib { background: #fff; }
.low .upload-container > .wrap { min-height: 132px; }
.bottom-row { align-items: flex-end; }
.hide-container > .html-container { padding: 0 !important; }
.card-text table { display: block; overflow-x: auto; margin: 0 0 8px !important; padding: 0 !important; }
.card-text :is(table, thead, tbody, tr, th, td) { border: 0 !important; }
.card-text :is(th, td) { padding: 5px 18px 5px 0 !important; text-align: left; vertical-align: top; font-size: .9rem;
  box-shadow: inset 0 -1px var(--border-color-primary); word-break: normal; overflow-wrap: normal; }
.card-text h2 { font-size: 1.05rem; margin: 14px 0 4px; }
.card-text .token.punctuation { color: #475569; }
.dark .card-text .token.punctuation { color: #cbd5e1; }
.card-text .token.string { color: #3f6212; }
.dark .card-text .token.string { color: #bef264; }
.card-text p, .card-text li { overflow-wrap: anywhere; }
.card-text th { color: var(--body-text-color-subdued); font-weight: 500; }
.shares { border-collapse: collapse; width: 100%; margin: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
.shares :is(tbody, tr, th, td), .shares { border: 0 !important; }
.shares th { font-weight: 500; text-align: left; padding: 4px 12px 4px 0; overflow-wrap: anywhere; }
.shares th div { display: flex; align-items: center; gap: 8px; }
.shares td { padding: 4px 0; white-space: nowrap; text-align: right; }
.shares td.bar { width: 45%; padding-right: 10px; }
.shares td.bar div { height: 12px; border-radius: 3px; background: var(--color-accent); min-width: 1px; }
.swatch { flex: none; width: 14px; height: 14px; border-radius: 3px; border: 1px solid #6b6b6b; }
.score { margin: 0 0 4px; line-height: 1.1; color: var(--body-text-color-subdued); }
.score strong { font-size: 3rem; font-weight: 650; color: var(--body-text-color); font-variant-numeric: tabular-nums; }
.with-result:not(:has(.shares)) > :not(:has(.hint)) { display: none; }
.filled .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.short-list { max-height: 290px; overflow-y: auto !important; }
.wide { overflow-x: auto; }
.wide img { max-width: none !important; width: max(100%, 820px) !important; }
.picker .wrap { flex-direction: column; }
.picker label { align-items: flex-start; width: 100%; box-sizing: border-box; }
.picker label span { white-space: pre-line; font-size: .82rem; line-height: 1.4; min-width: 0;
  overflow-wrap: anywhere; }
.picker label span::first-line { font-weight: 650; font-size: .86rem; }
.picker label input { margin-top: 4px; flex: none; }
.output-class:only-child { font-size: 1rem !important; font-weight: 400 !important;
  color: var(--body-text-color-subdued) !important; }
.output-class { overflow: hidden; overflow-wrap: anywhere; display: -webkit-box !important; -webkit-line-clamp: 3;
  -webkit-box-orient: vertical; text-align: center; padding-bottom: 0 !important; margin-bottom: var(--size-6); }
.confidence-set .inner-wrap { min-width: 0; }
.confidence-set .text { overflow-wrap: break-word; max-width: calc(100% - 64px); overflow: hidden;
  display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical; }
.picker-status { min-height: 60px; font-size: .85rem; color: var(--body-text-color-subdued); }
"""


BRAND = """<div class="brand"><span>mmoe gallery</span>
<button type="button" aria-expanded="false" aria-controls="models">Models</button></div>"""
BRAND_JS = """
const button = element.querySelector('button');
const open = wanted => {
  const list = document.getElementById('models');
  if (list) { list.classList.toggle('open', wanted); button.setAttribute('aria-expanded', String(wanted)); }
};
button.addEventListener('click', () => open(button.getAttribute('aria-expanded') !== 'true'));
document.addEventListener('change', event => { if (event.target.closest('#picker')) open(false); });
"""
# Gradio's menus open at any key, and act on it after the focus has moved on: Tab closes one and opens it again.
MENU_JS = """
document.addEventListener('keydown', event => {
  const known = ['ArrowDown', 'ArrowUp', 'Home', 'End', 'Enter', 'Escape'].includes(event.key);
  if (event.target.matches('[role=combobox]') && !known) event.stopPropagation();
}, true);
"""


def message(error: MmoeError) -> str:
    """A card that says what was asked, what is wrong and what works."""
    fix = f"<div>Try: {_code(error.fix)}</div>" if error.fix else ""
    wrong = f"<pre>{escape(error.wrong)}</pre>" if error.wrong else ""
    asked = error.asked
    if asked.partition(" ")[0].isalpha():  # not the name of a model
        asked = asked[:1].upper() + asked[1:]
    return f'<div class="error-card" role="alert"><strong>{escape(asked)}</strong>{wrong}{fix}</div>'


def _code(fix: str) -> str:
    """A line that works: what one types in the code font, words and what follows three spaces as they are."""
    typed, gap, about = fix.partition("   ")
    return f"<code>{escape(typed)}</code>{gap[:1]}{escape(about)}" if CODE.match(typed) else escape(fix)


def quoted(text: str, width: int = 60) -> str:
    """A visitor's words in a sentence: short, in quotes, and with a direction of writing of their own.

    >>> quoted("a fox that jumps", 8) == "“\\u2068a fox t…\\u2069”"
    True
    """
    return f"“\u2068{shorten(text, width)}\u2069”"


def chip(text: str, kind: str = "") -> str:
    """A small label; kind is "", "good" or "warn"."""
    return f'<span class="chip {escape(kind)}">{escape(text)}</span>'


def weights_chip(card: Card) -> tuple[str, str]:
    """Where a model's weights are: text and kind for `chip`."""
    if card.bundled:
        return "bundled", "good"
    return ("needs download", "warn") if card.weights else ("no weights", "warn")


def sizes(card: Card) -> str:
    """Active and total parameters, in short; one number for a dense model."""
    active, total = (short(card.params.get(kind, 0)) for kind in ("active", "total"))
    most = "at most " if card.moe.get("at_most") else ""
    return f"{most}{active} of {total} parameters active" if card.moe else f"{total} parameters, dense"


def head(card: Card) -> str:
    """The top of a model's page: name, summary, and the facts one wants first."""
    moe = card.moe
    facts = [chip(*weights_chip(card)), chip(sizes(card))]
    if moe:
        most = "at most " if moe.get("at_most") else ""
        each = f"{most}{moe['top_k']} per token"
        facts.append(chip(f"{moe['experts']} experts in each of {moe['layers']} layers, {each}"))
    facts.append(chip(f"licence {card.licence}"))
    others = {weights.licence for weights in card.weights.values()} - {card.licence}
    facts += [chip(f"weights: licence {licence}", "warn") for licence in sorted(others)]
    return (
        f'<header class="page-head{"" if moe else " dense"}"><h1>{escape(card.name)}</h1><p>{escape(card.summary)}</p>'
        f'<div class="chips">{"".join(facts)}</div></header>'
    )


def section(title: str, text: str = "") -> str:
    """A heading with a sentence below."""
    return f'<div class="section"><h2>{escape(title)}</h2>{f"<p>{escape(text)}</p>" if text else ""}</div>'


def hint(text: str) -> str:
    """A quiet sentence."""
    return f'<div class="hint"><p>{escape(text)}</p></div>' if text else ""


def shares(parts: Sequence[tuple[str, float, str]]) -> str:
    """Names with bars and percents.

    Args:
        parts: name, share of 1, and the colour that it has in a picture, or "" where there is none.
    """
    rows = []
    for name, share, color in parts:
        swatch = f'<span class="swatch" style="background: {escape(color)}"></span>' if color else ""
        paint = f"; background: {escape(color)}" if color else ""
        bar = f'<td class="bar"><div style="width: {100 * share:.1f}%{paint}"></div></td>'
        head = f'<th scope="row"><div>{swatch}{escape(name)}</div></th>'
        rows.append(f"<tr>{head}{bar}<td>{100 * share:.1f}&nbsp;%</td></tr>")
    return f'<table class="shares"><tbody>{"".join(rows)}</tbody></table>'


def score(value: float, best: str) -> str:
    """One large number.

    Args:
        value: the number.
        best: what it is to be compared with.
    """
    return f'<p class="score"><strong>{value:.3f}</strong> {escape(best)}</p>'


def data_url(picture: Image.Image, lossless: bool = True) -> str:
    """A small picture inside the page, so that it needs no file."""
    buffer = io.BytesIO()
    picture.save(buffer, "webp", lossless=lossless)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def scroll_to(elem_id: str) -> str:
    """JavaScript that brings an element into view."""
    return f"() => {{ document.getElementById('{elem_id}'){INTO_VIEW}; }}"


TEXT_JS = "value => String(value).replace(/[&<>\\x22']/g, sign => '&#' + sign.charCodeAt() + ';')"


def template(html: str, **fixed: Any) -> str:
    """A template for `gr.HTML` in which `${text(...)}` shows a visitor's words as they are.

    Gradio fills a template with Handlebars and runs the outcome as JavaScript: words that came in by Handlebars would
    be run as code, the value of an expression is not. An update of a component that is not on the page yet drops the
    properties that it does not name, so what never changes is written into the template.

    Args:
        html: the template.
        fixed: what stands for each `@name`.
    """
    for name, value in fixed.items():
        html = html.replace(f"@{name}", str(value))
    return "${(text => `" + html + "`)(" + TEXT_JS + ")}"


TABLE_TEMPLATE = """<div class="scroll" tabindex="0" role="region" aria-label="@label">${rows.length ? `<table>
<thead><tr>@header</tr></thead>
<tbody>${rows.map(row => `<tr>${row.map(cell => `<td><div title="${text(cell)}">${text(cell)}</div></td>`).join('')}
</tr>`).join('')}</tbody>
</table>` : ''}</div>"""
TABLE_CSS = """
.scroll { overflow-x: auto; }
table, thead, tbody, tr, th, td { border: 0 !important; }
table { border-collapse: collapse; width: 100%; margin: 0; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: left; white-space: nowrap;
  box-shadow: inset 0 -1px var(--border-color-primary); }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8.5em; }
td:first-child div { display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical; overflow: hidden; }
@media (max-width: 480px) { th, td { padding-right: 10px; } }
th { font-weight: 500; color: var(--body-text-color-subdued); }
"""


def table(header: list[str], *, label: str, **options: Any) -> gr.HTML:
    """A table that scrolls sideways on a narrow screen; `rows` fills it.

    Args:
        header: of the columns.
        label: for screen readers.
        options: of the component.
    """
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    html = template(TABLE_TEMPLATE, label=escape(label), header=names)
    return gr.HTML("", html_template=html, css_template=TABLE_CSS, rows=[], **options)


def rows(values: list[list[Any]]) -> gr.HTML:
    """New rows for a `table`."""
    return gr.HTML("", rows=values)


GRID_TEMPLATE = """<div class="tiles" role="group" aria-label="@label">${items.map(item => `
<button type="button" class="tile" data-id="${text(item.id)}" title="${text(item.name)}">
<img src="${text(item.src)}" alt="" width="64" height="64"><span class="tile-name">${text(item.name)}</span>
<span class="tile-note">${text(item.note)}</span>${item.mark ? `<span class="tile-mark">${text(item.mark)}</span>` : ''}
</button>`).join('')}</div><p class="tiles-empty">${text(empty)}</p>"""
GRID_CSS = """
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(@widthpx, 28%), 1fr)); gap: 8px; }
.tile { margin: 0; display: flex; flex-direction: column; align-items: center; gap: 1px; padding: 6px 4px; min-width: 0;
  border: 1px solid var(--border-color-primary); border-radius: 8px; background: var(--background-fill-primary);
  color: var(--body-text-color); cursor: pointer; font: inherit; }
.tile:hover { border-color: var(--color-accent); }
.tile img { width: @sizepx; height: @sizepx; margin: 0; background: #fff; border-radius: 6px; padding: 3px;
  object-fit: contain; }
.tile-name { font-size: .78rem; line-height: 1.25; text-align: center; overflow-wrap: anywhere; max-width: 100%;
  display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; }
.tile-note { font-size: .78rem; line-height: 1.25; color: var(--body-text-color-subdued);
  font-variant-numeric: tabular-nums; }
.tile-note:empty, .tiles-empty:empty { display: none; }
.tile-mark { font-size: .7rem; line-height: 1.4; padding: 0 6px; border-radius: 999px; background: #fef3c7;
  color: #78350f; }
.tiles-empty { overflow-wrap: anywhere; color: var(--body-text-color-subdued); margin: 6px 0; font-size: .875rem; }
"""
GRID_JS = """
element.addEventListener('click', event => {
  const tile = event.target.closest('button[data-id]');
  if (tile) { props.value = tile.dataset.id; trigger('select'); }
});
"""


def tiles(items: list[dict[str, str]], *, label: str, size: int = 64, **options: Any) -> gr.HTML:
    """A grid of pictures that are buttons; its value is the id of the one that was pressed, its event `select`.

    Args:
        items: each with id, name, src, note and mark.
        label: for screen readers.
        size: of the pictures in pixels.
        options: of the component.
    """
    css = GRID_CSS.replace("@width", str(round(1.3 * size + 42))).replace("@size", str(size))
    html = template(GRID_TEMPLATE, label=escape(label))
    return gr.HTML("", html_template=html, css_template=css, js_on_load=GRID_JS, items=items, empty="", **options)


def new_tiles(items: list[dict[str, str]], empty: str = "") -> gr.HTML:
    """New pictures for `tiles`, or what is said when there are none."""
    return gr.HTML("", items=items, empty=empty)
