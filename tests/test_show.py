"""The page of a run, also as a browser shows it where Chromium is installed."""

import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
from rollout import Problem
from shelf import show
from shelf.folder import token_values
from verify import Grade

HOSTILE = "</script><script>document.title = 'taken over'</script><img src=x onerror=alert(1)>"


def response(step, correct, tokens, **more):
    n = len(tokens)
    return dict(
        step=step, id="p1", problem=f"Compute {step}.", reference="3", reward=float(correct or 0),
        correct=correct, status="ok", extracted="3", finish_reason="stop",
        advantage=1.0 if correct else -1.0, tokens=tokens, vllm=[-0.1] * n, old=[-0.1, -2.0, -0.5],
        new=[-0.1, -1.0, -0.5], entropy=[0.1, 1.5, 0.2], weight=[1.0, 2.0, 1.0]) | more


def training_run(folder, responses):
    config = vars(evaluation_config()) | dict(environment=dict(commit="abc"))
    (folder / "config.json").write_text(json.dumps(config))
    metrics = [dict(step=0, eval_accuracy=0.2, eval_n=4), *(
        dict(step=s, reward=s / 4, entropy=0.5, ratio_max=0.1, mismatch_mean=1e-7) for s in
        range(3)), dict(step=3, eval_accuracy=0.6, eval_n=4)]
    for name, rows in (("metrics", metrics), ("tokens", responses)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluation_config():
    from shelf.config import parse_args

    return parse_args(["--setting=demo", "--preset=dapo", "--lr=0.5"])


@pytest.fixture
def run_folder(tmp_path):
    return training_run(tmp_path, [
        response(0, True, ["1+2", "=3", "<eos>"]),
        response(0, False, ["1+2", "=4", "<eos>"], weight=[0.0, 1.0, 1.0]),
        response(1, False, [HOSTILE, "x", "y"], status="no_answer", problem=HOSTILE),
        response(2, None, ["a", "b", "c"], old=None, new=None, entropy=None, weight=None)])


def data_of(path):
    text = path.read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_the_page_has_the_run(run_folder, capsys):
    evaluation.main(["show", str(run_folder)])
    assert "4 responses" in capsys.readouterr().out
    data = data_of(run_folder / "page.html")
    assert data["responses"][2]["tokens"][0] == HOSTILE  # and the page does not end there
    assert ["lr", "0.5", "0.00015"] in data["changed"] and len(data["changed"]) == 2
    assert data["table"] == [["held-out", "before (step 0)", "after (step 3)"],
                             ["accuracy", "0.2", "0.6"], ["n", "4", "4"]]
    assert data["curves"][0][0]["points"] == [[0, 0], [1, 0.25], [2, 0.5]]
    evaluation.main(["show", str(run_folder), "--step=1", f"--out={run_folder}/one.html"])
    assert [x["step"] for x in data_of(run_folder / "one.html")["responses"]] == [1]
    assert "http" not in show.PAGE.read_text().replace("http://www.w3.org/${svg}", "")  # no network


def test_a_token_outside_the_loss_weighs_nothing():
    """As under Fork Tokens, of which the advantages alone show nothing."""
    sample = SimpleNamespace(
        ids=[5, 6, 7], advantage=-0.5, reward=0.0, correct=False, finish_reason="stop",
        grade=Grade(False, None), prompt=SimpleNamespace(problem=Problem("p", "1+1", "2")))
    batch = dict(rollout_logprobs=torch.zeros(1, 4), shaped=torch.tensor([[-0.5, -1, -0.5, 0]]),
                 loss_mask=torch.tensor([[False, True, True, False]]))
    shown = token_values(batch, 0, sample, SimpleNamespace(decode=str))
    assert shown["weight"] == [0, 2, 1]


@pytest.mark.parametrize("flags, says", [
    (["/nowhere"], "holds neither a training run"), (["--step=9"], "--step 9: no response")])
def test_what_cannot_be_shown_is_a_sentence(flags, says, run_folder, capsys):
    flags = flags if flags[0][0] == "/" else [str(run_folder), *flags]
    with pytest.raises(SystemExit):
        evaluation.main(["show", *flags])
    assert says in capsys.readouterr().err


def test_a_run_without_tokens_is_shown_as_text(run_folder):
    (run_folder / "tokens.jsonl").unlink()
    (run_folder / "rollouts.jsonl").write_text(json.dumps(dict(
        step=0, id="p", problem="1+1", answer="2", response="It is 2", correct=True, status="ok",
        reward=1.0)) + "\n")
    [shown] = show.of_training(run_folder)["responses"]
    assert shown["response"] == "It is 2" and shown["answer"] == "2"


def test_an_evaluation_is_shown_as_text(tmp_path):
    data = show.of_evaluation(evaluation_folder(tmp_path / "evaluation", 1))
    assert data["table"][:2] == [["benchmark", "demo", "gpqa"], ["pass@2", "0.1235", "0.1235"]]
    assert [x["problem"] for x in data["responses"]] == ["Compute 0."] * 2 + [
        "7 (its question is not kept)"]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ACT = """<script>
const result = [], count = () => $("count").textContent.replace(/,.*/, "");
const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key}));
const set = (id, value, event) => { $(id).value = value; $(id).dispatchEvent(new Event(event)); };
result.push(count());
set("verdict", "wrong", "change"); result.push(count());
set("status", "no_answer", "change"); result.push(count());
result.push($("main").querySelector("h2").textContent === HOSTILE);
set("status", "all", "change"); set("verdict", "all", "change");
set("search", "=3", "input"); result.push(count());
set("search", "", "input"); set("part", "2", "change"); result.push(count());
const unjudged = document.querySelector(".response small").textContent.split(" · ")[0];
set("part", "all", "change"); press("j"); press("j"); press("j"); press("k");
result.push([...$("list").children].findIndex(b => b.classList.contains("here")));
press("k");
const tokens = [...document.querySelectorAll(".text span")], token = tokens[1];
token.dispatchEvent(new MouseEvent("mousemove", {bubbles: true, clientX: 5, clientY: 5}));
result.push($("tip").textContent, tokens.map(t => t.className).join(), document.title,
  unjudged);
document.body.dataset.result = JSON.stringify(result);
</script></html>"""


def browse(page: str, tmp_path, *flags: str):
    """Return what the page, opened in Chromium, leaves as JSON in its body's data-result."""
    path = tmp_path / "opened.html"
    path.write_text(page)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--dump-dom",
         "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path}/profile", *flags, path.as_uri()],
        capture_output=True, text=True, timeout=100)
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(re.search(r'data-result="(.*?)"', done.stdout)[1].replace("&quot;", '"')
                      .replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_browser_shows_it(run_folder, tmp_path):
    evaluation.main(["show", str(run_folder)])
    hostile = json.dumps(HOSTILE).replace("<", "\\u003c")
    page = (run_folder / "page.html").read_text()
    result = browse(page.replace("</html>", ACT.replace("HOSTILE", hostile)), tmp_path)
    assert result[:6] == ["4 responses to 3 prompts", "2 responses to 2 prompts",
                          "1 responses to 1 prompts", True, "1 responses to 1 prompts",
                          "1 responses to 1 prompts"]
    assert result[6] == 1
    assert "probability 0.1353" in result[7] and "ratio 2.718, clipped" in result[7]
    assert "advantage 1 x 2 = 2.000" in result[7] and "entropy 1.500 nats" in result[7]
    assert result[8:] == [",chosen,,,chosen,chosen", "dapo on train.jsonl", "not judged"]


def evaluation_folder(folder, problems: int):
    metrics = {f"pass@{2**i}": 0.123456789 for i in range(1, 6)} | dict(
        accuracy=0.5, accuracy_stderr=0.0123456, entropy=0.5, length=1e3, truncated=0.1, n=2)
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(dict(
        settings=dict(model="m" * 90), environment=dict(torch="2"),
        benchmarks=dict(demo=metrics, gpqa=metrics))))
    rows = [dict(benchmark="demo", id=str(i), sample=j, correct=False, status="ok", answer="2",
                 response="x" * 300, problem=f"Compute {i}.") for i in range(problems)
            for j in range(2)]
    rows += [dict(benchmark="gpqa", id="7", sample=0, correct=True, status="ok", response="so C")]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_an_evaluation_has_its_questions_and_all_its_responses(tmp_path):
    """And no legend of tokens, as there are none; one may look at a benchmark alone."""
    evaluation.main(["show", str(evaluation_folder(tmp_path / "run", 400))])
    page = (tmp_path / "run/page.html").read_text()
    result = browse(page.replace("</html>", """<script>
const result = [$("count").textContent, $("list").children.length, $("legend").offsetWidth,
  document.querySelector("h2").textContent, document.querySelector(".text").textContent.length];
$("part").value = "gpqa"; $("part").dispatchEvent(new Event("change"));
result.push($("count").textContent, document.querySelector("h2").textContent);
document.body.dataset.result = JSON.stringify(result);
</script></html>"""), tmp_path)
    assert result == ["801 responses to 401 prompts", 401, 0, "Compute 0.", 300,
                      "1 responses to 1 prompts", "7 (its question is not kept)"]


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("kind", ["run", "evaluation"])
def test_a_page_fits_a_phone(kind, run_folder, tmp_path):
    """400 pixels, in a frame, as Chromium's windows are wider."""
    folder = run_folder if kind == "run" else evaluation_folder(tmp_path / "evaluation", 3)
    evaluation.main(["show", str(folder), f"--out={tmp_path}/inner.html"])
    frame = """<iframe id=f src="inner.html" style="width: 400px; height: 900px"></iframe><script>
f.onload = () => document.body.dataset.result = f.contentDocument.documentElement.scrollWidth;
</script>"""
    assert browse(frame, tmp_path, "--allow-file-access-from-files") <= 400
