"""One page that shows a run: its curves, its flags, and its responses token by token.

    python eval.py show runs/X [--out page.html] [--step N]

Of a training run the page has the responses in tokens.jsonl (--log_tokens), else those in
rollouts.jsonl as text; of an evaluation those in samples.jsonl. It is one file without network or
build step. What the model wrote is untrusted: it is data in the page, shown as text only.
"""

import argparse
import json
from pathlib import Path

from shelf.folder import replace_file
from shelf.metrics import describe
from shelf.ranks import UsageError
from verify import read_jsonl

CURVES = (("reward", "eval_accuracy"), ("entropy_positive", "entropy_negative", "entropy"),
          ("response_length_positive", "response_length_negative", "response_length"),
          ("ratio_max", "grad_norm"), ("clip_low", "clip_high"), ("mismatch_mean",))
TABLE = ("accuracy", "accuracy_stderr", "entropy", "length", "truncated", "no_answer", "pass@2",
         "pass@4", "pass@8", "pass@16", "pass@32", "problems", "n")


def read(path: Path) -> list[dict]:
    return [record for _, record in read_jsonl(path)] if path.exists() else []


def table(rows: dict[str, dict]) -> list[list[str]]:
    """Return heading and rows of the metrics that any of them has."""
    names = [name for name in TABLE if any(name in row for row in rows.values())]
    cells = [[who, *(f"{row[name]:.4g}" if row.get(name) is not None else "-" for name in names)]
             for who, row in rows.items()]
    return [["", *names], *cells]


def of_training(folder: Path) -> dict:
    """Return what the page shows of a training run."""
    from shelf.config import defaults

    settings = json.loads((folder / "config.json").read_text())
    usual = vars(defaults(settings["setting"], settings["preset"]))
    changed = [[name, str(value), str(usual[name])] for name, value in settings.items()
               if name in usual and value != usual[name] and name not in ("output_dir", "resume")]
    metrics = read(folder / "metrics.jsonl")
    curves = [[dict(label=", ".join(describe(name)[:2]), meaning=describe(name)[2], points=[
        [x["step"], x[name]] for x in metrics if x.get(name) is not None]) for name in names]
        for names in CURVES]
    evals = [{k[5:]: v for k, v in x.items() if k.startswith("eval_")} | dict(step=x["step"])
             for x in metrics if "eval_accuracy" in x]
    rows = {f"held out, step {x['step']}": x for x in (evals[:1] + evals[1:][-1:])}
    responses = read(folder / "tokens.jsonl") or [
        x | dict(text=x["response"], reference=x["answer"]) for x in read(folder / "rollouts.jsonl")
    ]
    about = {k: v for k, v in settings.items() if k in usual} | settings.get("environment", {})
    return dict(title=f"{settings['preset']} on {Path(settings['data']).name}", changed=changed,
                about=[[k, str(v)] for k, v in about.items()], curves=curves, table=table(rows),
                responses=responses, clip=[settings["clip_low"], settings["clip_high"]])


def of_evaluation(folder: Path) -> dict:
    """Return what the page shows of an evaluation."""
    results = json.loads((folder / "results.json").read_text())
    about = results["settings"] | results["environment"]
    responses = [x | dict(text=x["response"], problem=f"{x['benchmark']}: {x['id']}",
                          reference=x.get("answer")) for x in read(folder / "samples.jsonl")]
    return dict(title=f"evaluation of {results['settings']['model']}", changed=[],
                about=[[k, str(v)] for k, v in about.items()], curves=[],
                table=table(results["benchmarks"]), responses=responses, clip=[0, 0])


def page(data: dict) -> str:
    """Return the page. In a script element only "<" could end the data."""
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.replace("/*DATA*/", packed)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("eval.py show", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a training run, or eval.py's --out")
    parser.add_argument("--out", type=Path, help="the page (default: RUN/page.html)")
    parser.add_argument("--step", type=int, help="responses of this step alone")
    args = parser.parse_args(argv)
    if (args.run / "metrics.jsonl").exists() and (args.run / "config.json").exists():
        data = of_training(args.run)
    elif (args.run / "results.json").exists():
        data = of_evaluation(args.run)
    else:
        raise UsageError(f"{args.run} holds neither a training run (config.json, metrics.jsonl) "
                         "nor an evaluation (results.json)")
    if args.step is not None:
        data["responses"] = [x for x in data["responses"] if x.get("step") == args.step]
        if not data["responses"]:
            raise UsageError(f"--step {args.step}: no response of that step was kept")
    out = args.out or args.run / "page.html"
    replace_file(out, page(data))
    print(f"{out}: {len(data['responses'])} responses, {out.stat().st_size / 1e6:.1f} MB")


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>a3po</title>
<style>
:root { color-scheme: light dark; --back: #fff; --text: #1a1a1a; --soft: #666; --line: #ddd;
  --rare: #e69f00; --chosen: #0072b2; --right: #00795a; --wrong: #c04a00; --panel: #f6f6f4 }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --text: #e8e8e6; --soft: #9a9a9a;
  --line: #3a3d42; --rare: #c98500; --chosen: #56b4e9; --right: #35c49a; --wrong: #f28a4b;
  --panel: #1f2226 } }
body { margin: 0; padding: 1rem 1.5rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.2rem } small, summary, label { color: var(--soft) }
table, nav { border-collapse: collapse; font-size: .85rem; margin: .5rem 0 }
td, th { padding: .15rem .6rem; border-bottom: 1px solid var(--line); text-align: left }
#curves { display: flex; flex-wrap: wrap; gap: 1rem; margin: .8rem 0 }
#curves figure { margin: 0; width: 250px } figcaption { font-size: .75rem; color: var(--soft) }
#bar { position: sticky; top: 0; background: var(--back); padding: .5rem 0; display: flex;
  flex-wrap: wrap; gap: .8rem; align-items: center; border-bottom: 1px solid var(--line) }
#body { display: grid; grid-template-columns: minmax(180px, 280px) 1fr; gap: 1.2rem }
#list { max-height: 80vh; overflow: auto; position: sticky; top: 3.5rem; align-self: start }
#list button { display: block; width: 100%; text-align: left; background: none; color: inherit;
  border: 0; border-left: 3px solid transparent; padding: .25rem .5rem; font: inherit;
  cursor: pointer; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
#list button.here { background: var(--panel); border-color: var(--chosen) }
.response { background: var(--panel); border-left: 4px solid var(--wrong); margin: .8rem 0;
  padding: .5rem .8rem; border-radius: 4px } .response.right { border-color: var(--right) }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, monospace }
.text span { border-bottom: 3px solid transparent; border-right: 1px solid var(--panel) }
.text span.chosen { border-bottom-color: var(--chosen) }
#tip { position: fixed; pointer-events: none; background: var(--text); color: var(--back);
  padding: .4rem .6rem; border-radius: 4px; font-size: .8rem; white-space: pre; display: none }
.swatch { display: inline-block; width: 5rem; height: .8rem; vertical-align: middle;
  background: linear-gradient(90deg, var(--rare), transparent); border: 1px solid var(--line) }
@media (max-width: 700px) { #body { display: block } #list { position: static; max-height: 30vh } }
</style>
<h1></h1><div id="about"></div><div id="curves"></div>
<div id="bar"><label>step <select id="step"></select></label>
<label>answer <select id="verdict"><option>all<option>right<option>wrong</select></label>
<label>status <select id="status"></select></label>
<input id="search" type="search" placeholder="search (/)" aria-label="search">
<small id="count"></small>
<small>keys j, k &nbsp; probability 0 <i class="swatch"></i> 1 &nbsp;
<span style="border-bottom:3px solid var(--chosen)">chosen</span> to weigh more</small></div>
<div id="body"><nav id="list"></nav><main id="main"></main></div><div id="tip"></div>
<script type="application/json" id="data">/*DATA*/</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id), COLOURS = ["--chosen", "--rare", "--soft"];
function add(parent, name, text, attributes = {}) {  // text only: nothing here is ever markup
  const svg = ["svg", "polyline", "text"].includes(name) ? "2000/svg" : "1999/xhtml";
  const node = document.createElementNS(`http://www.w3.org/${svg}`, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
}
function addTable(parent, rows, table = add(parent, "table")) {
  rows.forEach((row, i) => { const line = add(table, "tr");
    row.forEach(cell => add(line, i ? "td" : "th", cell)); });
}
function addCurve(lines) {
  const points = lines.flatMap(line => line.points);
  if (points.length < 2) return;
  const xs = points.map(p => p[0]), ys = points.map(p => p[1]), W = 250, H = 90;
  const [x0, x1, y0, y1] = [xs, ys].flatMap(values => [Math.min(...values), Math.max(...values)]);
  const figure = add($("curves"), "figure");
  const svg = add(figure, "svg", undefined, {viewBox: `0 0 ${W} ${H + 12}`, role: "img"});
  lines.forEach((line, i) => add(svg, "polyline", undefined, {fill: "none", "stroke-width": 1.6,
    style: `stroke: var(${COLOURS[i]})`, points: line.points.map(([x, y]) =>
      `${(x - x0) / (x1 - x0 || 1) * W},${H - (y - y0) / (y1 - y0 || 1) * (H - 6)}`).join(" ")}));
  const style = "font-size: 9px; fill: var(--soft)";
  add(svg, "text", `${y0.toPrecision(3)} to ${y1.toPrecision(3)}; steps ${x0} to ${x1}`,
      {x: 0, y: H + 11, style});
  lines.forEach((line, i) => { if (line.points.length) add(figure, "figcaption", line.label,
    {style: `border-left: 10px solid var(${COLOURS[i]}); padding-left: .4rem`,
     title: line.meaning}); });
}
const words = x => x.text ?? x.tokens.join("");
function describeToken(x, i) {
  const lines = [JSON.stringify(x.tokens[i])], at = name => x[name] ? x[name][i] : null;
  const [old, now, weight] = [at("old") ?? at("vllm"), at("new"), at("weight")];
  lines.push(`probability ${Math.exp(old).toFixed(4)}`);
  if (at("entropy") !== null) lines.push(`entropy ${at("entropy").toFixed(3)} nats`);
  if (weight !== null) lines.push(`advantage ${x.advantage} x ${weight} = ` +
    (x.advantage * weight).toFixed(3));
  if (now !== null) { const ratio = Math.exp(now - old);
    const clipped = x.advantage > 0 ? ratio > 1 + data.clip[1] : ratio < 1 - data.clip[0];
    lines.push(`ratio ${ratio.toFixed(3)}${clipped ? ", clipped: no gradient" : ""}`); }
  lines.push(`log p: vLLM ${at("vllm")}, trainer ${at("old") ?? "-"}, updated ${now ?? "-"}`);
  return lines.join("\n");
}
function addResponse(x) {
  const box = add($("main"), "div", undefined, {class: "response" + (x.correct ? " right" : "")});
  const facts = {reward: x.reward, advantage: x.advantage, status: x.status, answer: x.extracted,
    tokens: x.length ?? x.tokens?.length, "finish reason": x.finish_reason};
  add(box, "small", [x.correct ? "right" : "wrong", ...Object.entries(facts)
    .filter(f => f[1] != null).map(f => f.join(" "))].join(" · "));
  const least = Math.min(...x.weight ?? []), text = add(box, "div", x.text, {class: "text"});
  (x.tokens ?? []).forEach((token, i) => {
    const p = Math.exp((x.old ?? x.vllm)[i]), node = add(text, "span", token);
    node.style.background = `color-mix(in srgb, var(--rare) ${Math.round(75 * (1 - p))}%, ` +
      "transparent)";
    if (x.weight?.[i] > least) node.className = "chosen";
    node.token = [x, i];
  });
}
const groups = new Map();
data.responses.forEach(x => { const key = JSON.stringify([x.step, x.id, x.benchmark]);
  groups.set(key, [...(groups.get(key) ?? []), x]); });
let shown = [], here = 0;
function choose(number) {
  here = Math.max(0, Math.min(number, shown.length - 1));
  $("main").replaceChildren();
  const list = $("list");
  [...list.children].forEach((b, i) => { b.classList.toggle("here", i === here);
    const top = b.offsetTop - list.offsetTop;  // scrollIntoView would move the page too
    if (i === here) list.scrollTop = Math.min(top, Math.max(list.scrollTop,
      top + b.offsetHeight - list.clientHeight)); });
  if (!shown.length) return void add($("main"), "p", "nothing matches");
  const group = shown[here], x = group[0];
  add($("main"), "h2", x.problem, {style: "font-size: 1rem; white-space: pre-wrap"});
  if (x.reference != null) add($("main"), "small", `reference ${x.reference}`);
  group.forEach(addResponse);
}
function filter() {
  const step = $("step").value, verdict = $("verdict").value, status = $("status").value;
  const search = $("search").value.toLowerCase(), LIMIT = 300;
  const fits = x => (step === "all" || String(x.step) === step) &&
    (verdict === "all" || x.correct === (verdict === "right")) &&
    (status === "all" || x.status === status) &&
    (!search || (x.problem + words(x)).toLowerCase().includes(search));
  const found = [...groups.values()].map(g => g.filter(fits)).filter(g => g.length);
  shown = found.slice(0, LIMIT);
  $("list").replaceChildren();
  shown.forEach((group, i) => { const x = group[0], right = group.filter(r => r.correct).length;
    const when = x.step === undefined ? "" : `step ${x.step} · `;
    add($("list"), "button", `${when}${right}/${group.length} right · ${x.problem}`)
      .onclick = () => choose(i); });
  const n = found.reduce((sum, group) => sum + group.length, 0);
  $("count").textContent = `${n} responses to ${found.length} prompts` +
    (found.length > LIMIT ? `, the first ${LIMIT} are listed` : "");
  choose(0);
}
document.querySelector("h1").textContent = document.title = data.title;
if (data.table.length > 1) addTable($("about"), data.table);
if (data.changed.length) addTable($("about"), [["not the default", "value", "default"],
  ...data.changed]);
const details = add($("about"), "details");
add(details, "summary", "all settings and versions");
addTable(details, [["setting", "value"], ...data.about]);
data.curves.forEach(addCurve);
const unique = name => ["all", ...new Set(data.responses.map(x => x[name]))];
unique("step").filter(s => s !== undefined).forEach(s => add($("step"), "option", s));
unique("status").forEach(s => add($("status"), "option", s));
["step", "verdict", "status"].forEach(id => $(id).onchange = filter);
$("search").oninput = filter;
document.onkeydown = event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target === $("search")) return;
  if ("jk".includes(event.key)) choose(here + (event.key === "j" ? 1 : -1));
  if (event.key === "/") { $("search").focus(); event.preventDefault(); }
};
document.onmousemove = event => {
  const token = event.target.token, tip = $("tip");
  tip.style.display = token ? "block" : "none";
  if (!token) return;
  tip.textContent = describeToken(...token);
  tip.style.left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8) + "px";
};
filter();
</script></html>
"""
