"""Knobs have types, whatever spelling a person chooses; what is wrong is said in one line."""

import json
import re
import subprocess
import sys

import pytest
from commands import EVALUATE, INFER, ROOT, TRAIN, environment, error_line, run
from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser, ConfigWorkflow

from bundle.command_line import find_knob, given_texts, nest_settings, read_config, read_knobs, set_knobs, start
from bundle.errors import BundleError
from bundle.knobs import Knob, reached, read_text, words
from bundle.model import known_settings
from scripts.docs.knobs import knobs_in

FILES = {
    "train": [TRAIN],
    "evaluate": [TRAIN, "configs/evaluate.json"],
    "paper": [TRAIN, "configs/paper.json"],
    "inference": [INFER],
    "export": [INFER, "configs/export.json"],
    "exported": [INFER, "configs/exported.json"],
}
# by the type of the knob in words: a text for it, what it means, and a text that it refuses
EXAMPLES = {
    "true or false": ("false", False, "maybe"),
    "a whole number": ("3", 3, "3.5"),
    "a number": ("1e-3", 0.001, "wide"),
    "text": ("words", "words", None),
    "auto": ("auto", "auto", None),
    "all": ("all", "all", None),
    "null": ("null", None, None),
    "a list of whole numbers": ("[1, 2]", [1, 2], "[1, x]"),
    "a list of numbers": ("[0,1.5]", [0, 1.5], "1.5"),
    "a list of text": ("[onnx]", ["onnx"], "{}"),
    "device": ("cpu", "cpu", None),
}


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def knobs_of(name):
    """Every knob of a command: the plain values of its config, and the settings of the model."""
    config = read_config(FILES[name])
    plain = [key for key in config if not key.startswith("_") and is_knob(key, config)]
    return config, [*plain, *known_settings()]


def is_knob(name, config):
    value = config[name]
    steps = isinstance(value, list) and any(isinstance(item, (str, dict)) for item in value) and name != "formats"
    component = isinstance(value, dict) and name not in ("device", "tracking_uri")
    reference = isinstance(value, str) and value.startswith(("@", "$@network", "$@compute", "$@train", "$None"))
    return not (steps or component or reference)


# the file holds them, or decides them
UNUSED = {("exported", name) for name in ("weights", "weights_sha256", "checkpoint", "compile")}
EVERY = [(name, knob) for name in FILES for knob in knobs_of(name)[1] if (name, knob) not in UNUSED]


@pytest.mark.parametrize(("name", "knob"), EVERY)
def test_every_knob_takes_a_text_of_its_type_and_refuses_another(name, knob):
    found = find_knob(knob, read_config(FILES[name]))
    kinds = [kind.replace("/", " or ") for kind in words(found.kind).replace("e or f", "e/f").split(" or ")]
    assert set(kinds) <= EXAMPLES.keys(), f"{knob} has no declared type: {found.kind}"
    for kind in kinds:
        text, value, _ = EXAMPLES[kind]
        assert read_text(knob, text, found) == value
    wrong = EXAMPLES[kinds[0]][2]
    if wrong is not None and "text" not in kinds:
        with pytest.raises(BundleError, match=rf"--{knob} must be .*: for example --{knob} "):
            read_text(knob, wrong, found)


@pytest.mark.parametrize(("name", "knob"), sorted(UNUSED))
def test_a_knob_that_nothing_takes_is_refused(name, knob):
    with pytest.raises(BundleError, match=f"--{knob} has no use in this command"):
        find_knob(knob, read_config(FILES[name]))


@pytest.mark.parametrize("text", ["false", "False", "FALSE"])
@pytest.mark.parametrize("knob", ["per_position", "standardize", "share_orders", "position_code", "compile"])
def test_json_and_python_spell_false(knob, text):
    assert read_knobs({knob: text}, read_config([TRAIN])) == {knob: False}
    assert DefaultParseValue("false") == "false"  # what MONAI would be given


@pytest.mark.parametrize("text", ["null", "None", "none"])
@pytest.mark.parametrize("knob", ["layers", "feature_components", "cache_dir", "weights", "evaluation_size"])
def test_json_and_python_spell_nothing(knob, text):
    assert read_knobs({knob: text}, read_config([TRAIN])) == {knob: None}


@pytest.mark.parametrize("text", ["[8]", "[ 8 ]", "8"])
def test_lists_need_no_quotes_and_one_layer_no_list(text):
    assert read_knobs({"layers": text}, read_config([TRAIN]))["layers"] in (8, [8])


def test_numbers_stay_text_where_text_is_wanted():
    given = {"output_dir": "2026", "mask_rule": "==255", "cache_dir": "off"}
    assert read_knobs(given, read_config([TRAIN])) == given


@pytest.mark.parametrize("text", ["$None", "@output_dir", "%configs/train.json::seed"])
def test_monais_own_syntax_stays_as_it_is(text):
    assert read_text("seed", text, Knob(int, 0)) == text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batchsize": "3"}, "knob --batchsize is unknown: did you mean 'batch_size'"),
        ({"moed": "causal"}, "knob --moed is unknown: did you mean 'mode'"),
        ({"model::moed": "causal"}, "did you mean 'mode'"),
        ({"batch_size": "many"}, "--batch_size must be a whole number, got 'many': for example --batch_size 8"),
        (
            {"per_position": "0"},
            "--per_position must be true or false or auto, got '0': for example --per_position 'auto'",
        ),
        ({"train::trainer::max_epochs": "ten"}, "must be a whole number"),
        ({"seed": "1.5"}, "--seed must be a whole number"),
        ({"learning_rate": "inf"}, "--learning_rate must be a number"),
    ],
)
def test_a_wrong_knob_is_refused_with_type_and_example(given, message):
    with pytest.raises(BundleError, match=message):
        read_knobs(given, read_config([TRAIN]))


def test_nested_items_and_monais_own_options_are_accepted():
    given = {"train#trainer#max_epochs": "3", "tracking": "mlflow", "logging_file": "x", "model::mode": "causal"}
    assert read_knobs(given, read_config([TRAIN])) == {"train::trainer::max_epochs": 3, "model::mode": "causal"}


def test_arguments_that_only_a_foreign_component_knows_are_accepted():
    given = {"train::optimizer::weight_decay": "0.1", "train::trainer::amp": "true"}
    assert list(read_knobs(given, read_config([TRAIN])).values()) == [0.1, True]


def test_a_file_may_give_another_component():
    given = {"tracker": {"_target_": "bundle.tracking.Tracker", "uri": "off", "command": "x", "tags": {}}}
    assert read_knobs(given, read_config([TRAIN])) == given


def test_a_knob_whose_default_is_null_takes_null():
    config = read_config(FILES["evaluate"])
    assert read_knobs({"false_positive_rate": "null"}, config) == {"false_positive_rate": None}
    with pytest.raises(BundleError, match="--false_positive_rate must be a number or null, .*: for example .* 0.5"):
        read_knobs({"false_positive_rate": "some"}, config)


def test_settings_given_at_the_top_reach_the_model():
    parser = ConfigParser(ConfigParser.load_config_files([TRAIN]))
    parser["mode"], parser["per_position"] = "causal", False
    nest_settings(parser)
    assert (parser["model::mode"], parser["model::per_position"]) == ("causal", False)
    assert "mode" not in parser


def test_knobs_set_from_python_are_typed_and_nested():
    parser = ConfigParser(ConfigParser.load_config_files([TRAIN]))
    set_knobs(parser, {"per_position": "false", "seed": 3})
    assert (parser["model::per_position"], parser["seed"]) == (False, 3)


def started(tmp_path, *arguments, files=TRAIN, command="training"):
    """The config of a workflow that was started by a command line, as MONAI starts it."""
    argv = ["/somewhere/monai/bundle/__main__.py", "run", command, "--config_file", str(files), *arguments]
    given = {word[2:].split("=")[0]: DefaultParseValue(word.split("=")[1]) for word in arguments if "=" in word}
    given.pop("args_file", None)
    workflow = ConfigWorkflow(files, logging_file=False, workflow_type="train", **given)
    workflow.parser["arguments"] = argv
    workflow.parser["initialize"] = [{"_target_": "bundle.command_line.start", "arguments": "@arguments"}]
    hook = sys.excepthook
    try:
        workflow.initialize()
    finally:
        sys.excepthook = hook
    return workflow.parser


def test_the_command_line_corrects_what_fire_made_of_it(tmp_path):
    parser = started(tmp_path, "--per_position=false", "--cache_dir=null", "--compile=false", "--layers=[8]")
    assert parser["model::per_position"] is False
    assert parser["compile"] is False
    assert parser["cache_dir"] is None
    assert parser["model::layers"] == [8]


def test_a_file_of_arguments_is_read_alike_and_the_command_line_wins(tmp_path):
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"standardize": "false", "seed": 4, "batch_size": "16", "num_workers": 1}))
    parser = started(tmp_path, f"--args_file={file}", "--num_workers=2")
    assert (parser["model::standardize"], parser["seed"], parser["batch_size"]) == (False, 4, 16)
    assert parser["num_workers"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dilations", "[1,", "2]", "--mode", "causal"], "'2]' belongs to no knob: .* quote a list that has blanks"),
        (["guard=2"], "'guard=2' belongs to no knob"),
        (["--guard", "2", "--model::guard", "1"], "--guard is given twice"),
    ],
)
def test_a_word_too_many_is_refused(words, message):
    with pytest.raises(BundleError, match=message):
        given_texts(["training", "--config_file", TRAIN, *words], words=1)


def test_one_dash_is_read_as_two_and_negative_numbers_are_values():
    assert given_texts(["-write_dicom", "false", "--layers", "-1", "--compile", "-seed=3"]) == {
        "write_dicom": "false",
        "layers": "-1",
        "compile": "true",
        "seed": "3",
    }


@pytest.mark.parametrize("knob", ["output_dir", "mode", "device", "on_error"])
def test_null_is_no_text(knob):
    with pytest.raises(BundleError, match=f"--{knob} must be .*text, got null"):
        read_knobs({knob: "null"}, read_config([TRAIN]))


def test_quotes_around_a_text_are_no_part_of_it():
    assert read_knobs({"mode": "'causal'", "mask_rule": '">=128"'}, read_config([TRAIN])) == {
        "mode": "causal",
        "mask_rule": ">=128",
    }


def test_settings_at_the_top_reach_the_model_where_no_initialize_runs():
    """MONAI's commands ckpt_export and verify_net_in_out."""
    parser = ConfigParser(ConfigParser.load_config_files([TRAIN]))
    parser.update({"mode": "causal", "model::guard": 2})
    settings = parser.get_parsed_content("settings")
    assert (settings["mode"], settings["guard"]) == ("causal", 2)


@pytest.mark.parametrize(("name", "command"), [("train", "training"), ("inference", "inferring")])
def test_every_documented_knob_has_a_part_in_its_command(name, command):
    assert knobs_in(*FILES[name]).keys() <= reached(read_config(FILES[name]), [command, "initialize", "finalize"])


def test_knobs_of_training_have_no_part_in_an_evaluation():
    used = reached(read_config(FILES["evaluate"]), ["evaluating", "initialize", "finalize"])
    assert not used & {"max_epochs", "learning_rate", "patience", "cache_dir", "fit_patches", "noise_scale"}
    assert {"dataset_dir", "checkpoint", "mask_rule", "batch_size", "false_positive_rate", "cohort_dir"} <= used


def test_a_knob_without_a_part_in_the_command_is_named(tmp_path, caplog):
    started(
        tmp_path, "--max_epochs=3", "--learning_rate=0.1", "--seed=3", files=FILES["evaluate"], command="evaluating"
    )
    assert "max_epochs, learning_rate have no part in evaluating: nothing changes" in caplog.text
    assert "seed" not in caplog.text


@pytest.mark.parametrize("content", [None, "{", "[1]", "a: [1"])
def test_a_file_of_arguments_that_is_missing_or_none_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "arguments.json").write_text(content)
    with pytest.raises(BundleError, match='cannot read --args_file .*arguments.json"] .*: give a JSON or YAML file'):
        given_texts(["--args_file", str(tmp_path / "arguments.json")])


def test_a_flag_without_a_value_is_true(tmp_path):
    assert started(tmp_path, "--compile", "--seed=3")["compile"] is True


def test_nothing_happens_where_the_bundle_is_used_from_python():
    before = sys.excepthook
    start(["python", "script.py", "--per_position=maybe"])
    assert sys.excepthook is before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "config", "knobs", "message"),
    [
        ("training", TRAIN, {"per_position": "maybe"}, "--per_position must be true or false"),
        ("training", TRAIN, {"moed": "causal"}, "did you mean 'mode'"),
        ("evaluating", EVALUATE, {"batch_size": "[1]"}, "--batch_size must be a whole number"),
        ("inferring", INFER, {"write_dicom": "perhaps"}, "--write_dicom must be true or false"),
        ("inferring stray", INFER, {}, "'stray' belongs to no knob"),
        ("inferring", TRAIN, {}, "this config has no command 'inferring': .*training"),
    ],
)
def test_commands_refuse_wrong_knobs_in_one_line(command, config, knobs, message, tmp_path):
    run_id, *words = command.split()
    assert re.search(message, error_line(run(run_id, config, output_dir=tmp_path, words=words, **knobs)))


@pytest.mark.slow
def test_torchrun_reads_knobs_alike(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2")
    words = ["-m", "monai.bundle", "run", "training", "--config_file", TRAIN, "--per_position=maybe"]
    done = subprocess.run(
        [sys.executable, *launcher, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "error: --per_position must be true or false" in done.stderr
