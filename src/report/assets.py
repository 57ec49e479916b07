"""Style and script of the report page; inline, so that one file can be mailed and opened anywhere."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fcfcfb; --card: #ffffff; --ink: #1c1f23; --soft: #5b636d; --line: #d9dde2; --faint: #f1f3f5;
  --accent: #0b62a8; --loss: #d1602a; --warn: #fff4df; --warn-line: #e0a52d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f24; --ink: #e6e8eb; --soft: #a0a8b2; --line: #343a42; --faint: #22272d;
    --accent: #6db3f2; --loss: #e0743c; --warn: #33290f; --warn-line: #a97d1f;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.5rem; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; text-wrap: balance; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; padding-top: .4rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0; }
a { color: var(--accent); }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.soft, figcaption, .note { color: var(--soft); font-size: .88rem; }
nav {
  position: sticky; top: 0; z-index: 5; background: var(--page); border-bottom: 1px solid var(--line);
  margin-top: 1.2rem;
}
nav div {
  max-width: 1120px; margin: 0 auto; padding: .55rem 1.5rem; display: flex; gap: 1.2rem; overflow-x: auto;
}
nav a { text-decoration: none; font-size: .9rem; white-space: nowrap; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; margin: 1.4rem 0;
}
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.65rem; font-weight: 650; line-height: 1.25; }
.tile span { display: block; font-size: .85rem; color: var(--soft); }
.summary { max-width: 50rem; padding-left: 1.1rem; }
.summary li { margin: .35rem 0; }
.warning {
  background: var(--warn); border-left: 4px solid var(--warn-line); border-radius: .3rem;
  padding: .55rem .9rem; margin: .6rem 0; max-width: 50rem; font-size: .92rem;
}
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; background: var(--card); }
table { border-collapse: collapse; font-size: .87rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .5rem; text-align: right; white-space: nowrap; }
th {
  font-weight: 600; vertical-align: bottom; border-bottom: 1px solid var(--line); background: var(--faint);
}
th:first-child, td:first-child { padding-left: .8rem; } th:last-child, td:last-child { padding-right: .8rem; }
th small { display: block; font-weight: 400; color: var(--soft); font-size: .78rem; }
th.text, td.text { text-align: left; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--accent); }
th button:hover { color: var(--accent); }
th[aria-sort=ascending] button::after { content: " ▲"; font-size: .7em; }
th[aria-sort=descending] button::after { content: " ▼"; font-size: .7em; }
table.sortable :is(th, td):first-child { position: sticky; left: 0; background: var(--card); }
table.sortable th:first-child { background: var(--faint); }
tr.break td { border-top: 1px solid var(--line); }
tbody tr:hover td { background: var(--faint); }
td.loss { background: color-mix(in srgb, var(--loss) calc(var(--share) * 62%), var(--card)); }
.pin { position: sticky; right: 0; border-left: 1px solid var(--line); }
td.pin:not(.loss) { background: var(--card); }
.forms { margin: .4rem 0 1.2rem; font-size: .85rem; }
.forms summary, .sample summary { cursor: pointer; }
.forms summary { color: var(--soft); }
pre {
  overflow: auto; max-height: 22rem; background: var(--faint); padding: .7rem; border-radius: .4rem;
  font-size: .8rem;
}
figure { margin: 1.2rem 0; }
figure svg { max-width: 100%; height: auto; display: block; color: var(--ink); }
figcaption { max-width: 46rem; margin-top: .3rem; }
dl.notes {
  display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .7rem 1.2rem;
  font-size: .92rem;
}
dl.notes dt { font-weight: 600; } dl.notes dd { margin: 0; max-width: 46rem; }
dl.notes p { margin: 0 0 .25rem; }
.box {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .3rem 1.1rem 1rem;
}
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.pair td, .pair th { white-space: normal; text-align: left; background: none; vertical-align: top; }
.sample { border: 1px solid var(--line); border-radius: .5rem; background: var(--card); margin: .45rem 0; }
.sample summary {
  padding: .5rem .9rem; display: grid; grid-template-columns: 14rem 1fr auto 8rem; gap: .8rem;
  align-items: baseline;
}
.sample summary b, .sample summary code { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.sample summary .range { text-align: right; font-variant-numeric: tabular-nums; }
.sample > div { padding: 0 .9rem .8rem; }
.sample td { white-space: normal; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
.sample td.who { min-width: 12rem; }
.sample td.score { width: 4.5rem; text-align: right; font-variant-numeric: tabular-nums; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto; }
.meter { display: inline-flex; gap: 2px; align-self: center; }
.meter i.gap { margin-left: .35rem; }
.meter i.none { border-style: dashed; }
.meter i { width: .62rem; height: .9rem; border-radius: 2px; border: 1px solid var(--line);
  background: linear-gradient(to top, var(--accent) calc(var(--share) * 100%), transparent 0); }
select { font: inherit; font-size: .9rem; padding: .2rem .4rem; }
footer { color: var(--soft); font-size: .85rem; padding-bottom: 3rem; margin-top: 3rem; }
@media (max-width: 640px) {
  header, main, footer, nav div { padding-left: 1rem; padding-right: 1rem; }
  dl.notes, .sample summary { grid-template-columns: 1fr; gap: .2rem; }
  .sample summary .range { text-align: left; }
}
@media print {
  :root {
    color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --faint: #fff;
  }
  body { font-size: 10pt; } nav, .forms, .controls { display: none; }
  header, main, footer { max-width: none; padding: 0; }
  h2 { break-after: avoid; margin-top: 1.4rem; } figure, tr, .tile, .sample { break-inside: avoid; }
  .scroll { overflow: visible; border: 0; } table { font-size: 8pt; } th, td { padding: .15rem .35rem; }
  .said { max-height: none; } td.loss { print-color-adjust: exact; }
}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[place].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, "en", {numeric: true}) : x - y;
      return down ? -order : order;
    });
    rows.forEach(row => row.classList.remove("break"));
    body.append(...rows);
  }));
}
const choice = document.getElementById("task-choice");
if (choice) choice.addEventListener("change", () => {
  for (const sample of document.querySelectorAll(".sample"))
    sample.hidden = choice.value !== "" && sample.dataset.task !== choice.value;
});
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll(".sample:not([open])")].slice(0, 6);
  opened.forEach(sample => sample.open = true);
});
addEventListener("afterprint", () => opened.forEach(sample => sample.open = false));
"""
