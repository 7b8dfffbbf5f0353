import json
import re
import shutil

import numpy as np
import pytest
import runs
import torch

from nanomem import facts, findings, readers, report, teaching, tokenizer
from nanomem.cli import UserError, shipped
from nanomem.config import GPTConfig
from nanomem.data import FactData
from nanomem.model import GPT
from nanomem.observe import lookups_of, slot_shares

LONG = "x<y> " * 2000  # 10,000 characters
HOSTILE = {
    "It closes </script><script>window.hacked = 1</script> with": "<img src=x onerror='window.hacked = 1'>",
    "Quotes \" ' ` & and <!-- are": "]]> --> </title> ${window.hacked = 1}",
    "من هو المدير؟": "ليلى \u202eحداد",
    "Lines end with": "one\u2028two\u2029three",
    "Control characters are": "\u0000\u0007\x1b[31m",
}
FACTS = [{"prompt": prompt, "answer": answer} for prompt, answer in HOSTILE.items()]


def data_of(path):
    """The data that a page has."""
    text = path.read_text(encoding="utf-8")
    (embedded,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(embedded)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny runs: people with two memory layers, without memory, taught, of hostile facts, and of text."""
    folder = tmp_path_factory.mktemp("runs")
    people = ("--data=people", "--block_size=64", "--max_iters=10")
    runs.train(folder / "people-memory", *people, "--mem_layers=0,1", "--mem_share_values=false")
    runs.train(folder / "people-dense", *people, "--ffn=dense")
    runs.run("train.py", "--device=cpu", f"--init_from={folder / 'people-memory'}", "--people_seed=2",
             "--n_entities=10", "--data=people", "--max_iters=3", f"--out_dir={folder / 'taught'}")
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, FACTS)))
    runs.train(folder / "hostile", f"--data={folder / 'facts.jsonl'}", "--max_iters=3", "--block_size=128")
    (folder / "book.txt").write_text("To be, or not to be: that is the question.\n" * 100)
    runs.train(folder / "text", f"--data={folder / 'book.txt'}", "--max_iters=2")
    return folder


@pytest.fixture(scope="module")
def people(folder):
    """The part of the page about the run of people."""
    path = report.write([folder / "people-memory"], folder / "people.html")
    (run,) = data_of(path)["runs"] if path.stat().st_size < 5e6 else [None]
    return run


# ------------------------------------------------------------------------------------------------
# What a slot is for


@pytest.fixture(scope="module")
def small():
    """(a model, its data)"""
    data = FactData(facts.people(40), tokenizer.load(shipped("people") / "tokenizer.tiktoken"), 64)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=data.encoding.n_vocab, n_layer=2, n_embd=16, n_head=2, block_size=64,
                          mem_layers="1", mem_n_keys=8, mem_heads=2, mem_knn=2))
    return model.eval(), data


def test_words_begin_at_blanks_and_where_letters_end():
    encoding = tokenizer.byte_encoding()
    text = encoding.encode_ordinary("Ann born: 3 May")
    tokens = np.array([[encoding.eot_token, *text, encoding.eot_token]])
    numbers, words = readers.number_words(encoding, tokens)
    assert words == ["<|endoftext|>", "Ann", "born", ":", "3", "May"]
    assert numbers[0].tolist() == [0, 1, 1, 1, *[2] * 5, 3, 4, 4, *[5] * 4, 0]


def test_clues_say_what_the_readers_of_a_slot_have_in_common():
    """Slot 7 is read at "b", which only "a" comes before; slot 8 everywhere."""
    encoding = tokenizer.byte_encoding()
    documents = ["a b c", "d c c", "d e c", "a b d"]
    tokens = np.array([[encoding.eot_token, *encoding.encode_ordinary(text)] for text in documents])
    places = np.flatnonzero(tokens == ord("b"))
    everywhere = np.arange(tokens.size)
    slots = np.concatenate([np.full(len(places), 7), np.full(len(everywhere), 8)])
    reads = readers.Reads(slots, np.ones(len(slots)), np.concatenate([places, everywhere]))
    sample = readers.Sample(encoding, tokens, {0: reads})
    words, clues = sample.words[1], sample.clues(0, np.array([7, 8, 9]))
    found = {clue.relation: (words[clue.word], clue.share) for clue in clues[7]}
    assert found["at"] == ("b", 1) and found["after"] == ("a", 1)
    (usual,) = {clue.usual for clue in clues[7] if clue.relation == "at"}
    assert usual == pytest.approx((tokens == ord("b")).mean() * 2)  # the blank before it is part of the word
    assert clues[7][0].score > clues[8][0].score and clues[9] == []
    assert sample.contexts(0, 7) == [("a b", 2.0)]
    assert sample.heaviest(0, np.array([7, 9]), 3) == {7: [(3, 2.0)], 9: []}


def test_a_context_reaches_back_to_the_word_that_explains_it():
    encoding = tokenizer.byte_encoding()
    text = "Deborah Blackcroft, who was born in 1990, lives in Oslo"
    tokens = np.array([[encoding.eot_token, *encoding.encode_ordinary(text), encoding.eot_token]])
    sample = readers.Sample(encoding, tokens, {})
    position = 1 + text.index("lives")
    word = sample.words[1].index("Blackcroft")
    before, token, after = sample.around(position, word)
    assert before.strip() == text[8:position - 1].strip() and token == "l" and after == "ives"
    assert "Blackcroft" not in sample.around(position)[0]
    assert sample.around(0) == ("", "<|endoftext|>", "")


def test_what_a_value_favours_is_its_part_of_the_logits(small):
    """The slots' parts, and what remains of the residual stream, add up to the logits."""
    model, data = small
    tokens, _ = data.batch("train", 0, 1)
    seen, inputs = {}, {}
    block = model.blocks[-1]
    hooks = [block.ffn.register_forward_hook(lambda *call: inputs.update(memory=call[2])),
             model.norm.register_forward_pre_hook(lambda _, x: inputs.update(last=x[0]))]
    with torch.no_grad(), readers.watch_gates(model, seen):
        slots, weights = lookups_of(model, tokens)[1]
        logits, _ = model(tokens)
    for hook in hooks:
        hook.remove()
    place = 5
    gates = seen[1][0][place].expand(slots[place].numel(), -1)
    parts = readers.favours(model, 1, slots[place].flatten(), gates)             # (lookups, vocab_size)
    from_memory = (weights[place].flatten()[:, None] * parts).sum(dim=0)
    with torch.no_grad():
        bias = block.ffn.out_proj.bias
        rest = inputs["last"][0, place] - inputs["memory"][0, place] + bias
        rms = inputs["last"][0, place].square().mean().sqrt()
        others = model.lm_head(rest * model.norm.weight / rms)
    torch.testing.assert_close(from_memory + others, logits[0, place], rtol=1e-3, atol=1e-4)


def test_the_gates_of_readers_are_weighted_by_their_weights():
    reads = readers.Reads(np.array([3, 3, 5]), np.array([1.0, 3.0, 1.0], np.float32), np.array([0, 1, 2]))
    gates = torch.tensor([[1.0], [2.0], [6.0]])
    sample = readers.Sample(None, np.zeros((1, 3), int), {0: reads}, {0: gates})
    means = readers.gates_of_readers(sample, 0, np.array([3, 4, 5]))
    assert means.flatten().tolist() == [1.75, 3.0, 6.0]


# ------------------------------------------------------------------------------------------------
# The page's data


def test_the_run_its_settings_and_its_curves(folder, people):
    settings = {name: (value, default) for name, value, default in people["settings"]}
    assert settings["mem_layers"] == ("0,1", "2") and settings["max_iters"] == ("10", "2560")
    assert "out_dir" not in settings and "train" not in settings
    about = dict(people["about"])
    assert about["data"] == "people: 20 entities x 5 attributes = 100 facts" and about["updates"] == "10"
    assert "in memory tables" in about["parameters"] and about["machine"] != "not recorded"
    curves = {curve["title"]: curve["points"] for curve in people["curves"]}
    assert [updates for updates, _ in curves["recall, never asked"]] == [5, 10]
    recorded = [row["train_loss"] for row in runs.metrics(folder / "people-memory")]
    assert [loss for _, loss in curves["training loss"]] == recorded


def test_questions_have_answer_truth_and_confidence(folder, people):
    assert people["recall"]["kinds"] == ["never asked", "taught wording"]
    names = [name for name, *_ in people["recall"]["rows"]]
    assert names == ["birth date", "birth city", "university", "major", "employer", "head", "torso", "tail",
                     "all"]
    fact_set = facts.people(20, 0.6, 1337)
    assert len(people["questions"]) == (fact_set.role == facts.REPORT).sum()
    for question in people["questions"]:
        assert question["right"] == (question["answer"] in question["truth"])
        assert 0 <= question["confidence"] <= 1


def test_chips_have_the_slots_that_each_layer_reads(folder, people):
    saved = teaching.find(folder / "people-memory", "RUN")
    model = GPT(saved.config).eval()
    saved.load(model)
    encoding = tokenizer.load(saved.tokenizer())
    question = people["questions"][0]
    text = f"{question['prompt']} {question['answer'].removesuffix(' …')}"
    prompt = [encoding.eot_token, *encoding.encode_ordinary(question["prompt"])]
    looked_up = lookups_of(model, torch.tensor([prompt]))
    for place, (token, is_answer, slots) in enumerate(question["chips"][:len(prompt) - 1], 1):
        assert token == encoding.decode([prompt[place]]).strip() and token in text and not is_answer
        for (indices, weights), flat in zip(looked_up.values(), slots):
            shares = slot_shares(indices[place], weights[place])
            assert len(flat) == 2 * len(shares)
            for slot, share in zip(flat[::2], flat[1::2]):
                assert share / 1000 == pytest.approx(shares[slot], abs=2e-3)
    assert any(is_answer for _, is_answer, _ in question["chips"])


def test_a_slots_updates_and_readers(folder, people):
    memory = people["memory"]
    saved = runs.checkpoint(folder / "people-memory")
    assert memory["layers"] == [0, 1] and memory["table_of"] == [0, 1] and memory["updates"] == 10
    for layer, details, table in zip(memory["layers"], memory["slots"], memory["tables"]):
        reads = saved[f"reads.blocks.{layer}.ffn.table.values"]
        assert table["used"] == (reads > 0).sum() and table["most"] == reads.max()
        assert {detail["slot"]: detail["updates"] for detail in details} == {
            detail["slot"]: int(reads[detail["slot"]]) for detail in details}
        for detail in details:
            assert detail["contexts"] and len(detail["favours"]) == 5
            assert {clue[0] for clue in detail["clues"]} <= {"at", "before", "after"}


def test_the_picture_of_a_large_table_is_pooled():
    pooled = findings.pool(np.arange(25), 5, 2)
    assert pooled.tolist() == [[6, 8, 9], [16, 18, 19], [21, 23, 24]]


def test_slots_that_teaching_changed(folder, people):
    (run,) = data_of(report.write([folder / "taught"], folder / "taught.html"))["runs"]
    saved = runs.checkpoint(folder / "taught")
    for table, layer in zip(run["memory"]["tables"], (0, 1)):
        changed = saved[f"optimizer.blocks.{layer}.ffn.table.values.reads"] > 0
        assert table["n_changed"] == changed.sum() > 0
    assert "n_changed" not in people["memory"]["tables"][0]


def test_an_export_and_a_run_whose_data_is_gone(folder, tmp_path):
    runs.run("sample.py", f"--out_dir={folder / 'people-memory'}", f"--export={tmp_path / 'export'}")
    shutil.copytree(folder / "text", tmp_path / "gone")
    for name in ("config.json", "checkpoint-2/checkpoint.json"):
        path = tmp_path / "gone" / name
        path.write_text(path.read_text().replace("book.txt", "lost.txt"))
    page = report.write([tmp_path / "export", tmp_path / "gone"], tmp_path / "page.html")
    export, gone = data_of(page)["runs"]
    assert export["curves"] == [] and export["questions"] and export["memory"]["slots"][0]
    assert gone["questions"] == [] and "lost.txt" in gone["notes"][0] and gone["memory"]["slots"] == [[]]


def test_a_text_has_passages(folder):
    (run,) = data_of(report.write([folder / "text"], folder / "text.html"))["runs"]
    assert "recall" not in run and all("chips" in passage for passage in run["questions"])
    assert "To be" in "".join(passage["prompt"] for passage in run["questions"])


def test_wrong_answers_are_shown_first():
    known = np.ones(1000, dtype=bool)
    known[::10] = False
    chosen = findings.choose(known, 400)
    assert len(set(chosen)) == 400 and (~known[chosen]).sum() == 100
    assert (~known[findings.choose(known, 60)]).sum() == 30
    assert len(findings.choose(~known, 2000)) == 1000


# ------------------------------------------------------------------------------------------------
# Hostile texts


def test_hostile_facts_are_data(folder):
    path = report.write([folder / "hostile"], folder / "hostile.html")
    text = path.read_text(encoding="utf-8")
    assert text.count("</script>") == report.TEMPLATE.read_text(encoding="utf-8").count("</script>")
    assert "\u2028" not in text and "\x00" not in text
    (run,) = data_of(path)["runs"]
    assert {question["prompt"]: question["truth"] for question in run["questions"]} == {
        prompt: [answer] for prompt, answer in HOSTILE.items()}


def test_json_is_safe_inside_a_script():
    value = {"</script>": "<!--\u2028\ud800"}
    text = report.as_json(value)
    assert "<" not in text and text.isascii() and json.loads(text) == value
    with pytest.raises(ValueError):
        report.as_json(float("nan"))


# ------------------------------------------------------------------------------------------------
# The command line


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["nanomem/report.py", *map(str, arguments)])
    report.main()
    return capsys.readouterr().out


def test_the_command_writes_into_the_runs_folder(folder, monkeypatch, capsys):
    said = call(monkeypatch, capsys, folder / "people-dense", folder / "people-memory", "--device=cpu")
    path = folder / "people-dense" / "report.html"
    assert str(path) in said.replace("\n", "") and len(data_of(path)["runs"]) == 2
    dense, memory = data_of(path)["runs"]
    assert "memory" not in dense and dense["questions"] and memory["memory"]


@pytest.mark.parametrize("arguments, message", [
    ([], "expected folders of runs, such as"),
    (["people-memry"], r"people-memry is no folder \(did you mean .*people-memory\?\)"),
    (["people-memory/config.json"], r"config.json is no folder \(did you mean .*people-memory\?\)"),
    (["people-memory/checkpoint-10"], r"checkpoint-10 has no trained model \(did you mean people-memory\?\)"),
    (["people-memory", "people-memory"], "people-memory is there twice"),
    (["people-memory", "--ouput=x"], r"unknown setting --ouput \(did you mean out"),
    (["people-memory", "--out=nowhere/page.html"], "page.html must be a file in a folder that exists"),
])
def test_bad_input_is_one_line(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        call(monkeypatch, capsys, *arguments)


def test_a_new_run_moves_the_page_of_the_earlier_one(tmp_path):
    runs.train(tmp_path / "run", "--max_iters=1")
    (tmp_path / "run" / "report.html").write_text("a page")
    out, _ = runs.train(tmp_path / "run", "--max_iters=1")
    assert (tmp_path / "run.1" / "report.html").exists() and not (tmp_path / "run" / "report.html").exists()
    assert out.splitlines()[-1].endswith(f"python -m nanomem.report {tmp_path / 'run'}")


# ------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, driven by selenium; both come with Debian and PyPI."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def find(browser, selector):
    """The elements that a CSS selector names."""
    return browser.find_elements("css selector", selector)


def open_page(browser, path):
    browser.get(path.as_uri())
    return browser


def test_a_chip_is_pointed_at_and_a_slot_chosen(browser, folder, people):
    from selenium.webdriver.common.action_chains import ActionChains

    open_page(browser, folder / "people.html")
    chip = find(browser, ".chip")[3]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chip)
    ActionChains(browser).move_to_element(chip).perform()
    text, _, slots = people["questions"][0]["chips"][3]
    assert chip.text == text and text in find(browser, "#token h3")[0].text
    first = find(browser, ".slots button")[0]
    assert first.text.split("\n")[0] == str(slots[0][0])
    chip.click()
    find(browser, ".slots button")[0].click()
    assert find(browser, "#slot h3")[0].text == f"Slot {slots[0][0]}, as layer 0 reads it"
    assert "updates read it" in find(browser, "#slot")[0].text
    assert find(browser, "#table .marks") and len(find(browser, "#table .cross")) == 2
    assert browser.get_log("browser") == []


def test_questions_are_filtered(browser, folder, people):
    open_page(browser, folder / "people.html")
    find(browser, "#verdict option[value=wrong]")[0].click()
    wrong = [question for question in people["questions"] if not question["right"]]
    assert find(browser, "#count")[0].text == f"{len(wrong)} questions"
    find(browser, "#attribute option[value=major]")[0].click()
    of_major = [question for question in wrong if question["about"] == "major"]
    assert len(find(browser, "#questions button")) == len(of_major)
    find(browser, "#words")[0].send_keys(of_major[0]["prompt"])
    assert len(find(browser, "#questions button")) == 1
    assert browser.get_log("browser") == []


def test_the_keyboard_is_enough(browser, folder, people):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, folder / "people.html")
    questions = find(browser, "#questions button")
    browser.execute_script("arguments[0].focus()", questions[0])
    questions[0].send_keys(Keys.ARROW_DOWN)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert find(browser, "#questions button")[1].get_attribute("aria-current") == "true"
    chip = find(browser, ".chip")[0]
    browser.execute_script("arguments[0].focus()", chip)
    chip.send_keys(Keys.ARROW_RIGHT)
    assert find(browser, "#token h3")
    table = find(browser, "#table")[0]
    table.send_keys(Keys.ARROW_RIGHT)
    assert "row 0, column 1" in find(browser, "#cell")[0].text
    find(browser, "#find")[0].send_keys(Keys.ENTER)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.switch_to.active_element.get_attribute("id") == "slot"
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert browser.switch_to.active_element == find(browser, "#found button")[0]
    assert len(find(browser, "#questions button[tabindex='0']")) == 1


def test_a_slot_is_found_by_its_word(browser, folder, people):
    memory = people["memory"]
    texts, detail = memory["texts"], memory["slots"][0][0]
    word = texts[detail["clues"][0][1]]
    open_page(browser, folder / "people.html")
    find(browser, "#find")[0].send_keys(word)
    names = [button.text.split(":")[0] for button in find(browser, "#found button")]
    assert f"slot {detail['slot']}" in names
    first = find(browser, "#found button")[0].text
    assert word in first and " token" in first
    find(browser, "#find")[0].clear()
    find(browser, "#find")[0].send_keys("0,010")
    find(browser, "#found button")[0].click()
    assert "Slot 10," in find(browser, "#slot h3")[0].text
    find(browser, "#find")[0].send_keys("no such word")
    assert "You can search for" in find(browser, "#found")[0].text


def test_several_runs_are_on_one_page(browser, folder):
    open_page(browser, report.write([folder / "people-dense", folder / "people-memory"], folder / "two.html"))
    assert len(find(browser, "#curves figure:first-child path")) == 2
    assert not find(browser, "#looking")[0].is_displayed()
    find(browser, "#run option")[1].click()
    assert find(browser, "#looking")[0].is_displayed() and browser.get_log("browser") == []


@pytest.mark.parametrize("name", ["hostile", "text", "taught"])
def test_other_pages_have_no_errors(browser, folder, name):
    open_page(browser, report.write([folder / name], folder / f"{name}.html"))
    for button in find(browser, "#questions button"):
        browser.execute_script("arguments[0].click()", button)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    if name == "hostile":
        assert browser.execute_script("return window.hacked") is None
        shown = [element.get_property("textContent") for element in find(browser, "#questions .text")]
        assert set(HOSTILE) <= set(shown) and not find(browser, "#questions img, #question img")


def test_a_long_answer_is_shown_as_text(browser, folder, people):
    """A model that answers it takes blocks of 10,000 tokens, so the page's data is changed instead."""
    changed = json.loads(json.dumps(people))
    changed["questions"][0]["truth"] = [LONG]
    path = folder / "long.html"
    page = {"written": "", "runs": [changed]}
    path.write_text(report.TEMPLATE.read_text(encoding="utf-8").replace(report.DATA, report.as_json(page)))
    open_page(browser, path)
    assert any(element.get_property("textContent") == LONG for element in find(browser, "#question .text"))
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
