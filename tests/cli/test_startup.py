"""What `tune-style` itself does: finding verbs, starting fast, exit codes."""

import errno
import os
import subprocess
import sys
import types

import pytest

import torchrecipes
from torchrecipes.cli import main as cli
from torchrecipes.errors import UserError


def python(*words: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **settings)


LIGHT = [["ls"], ["--help"], ["run", "--help"], ["cat", "mlm_pretrain"], ["--version"], [], ["data"]]
LIGHT += [[*verb.split(), "--help"] for verb in cli.all_verbs() if verb not in cli.VERBS]


@pytest.mark.parametrize("words", LIGHT)
def test_what_needs_no_torch_does_not_import_it(words):
    program = (
        "import sys\n"
        "from torchrecipes.cli.main import main\n"
        f"try: main({words!r})\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'omegaconf', 'numpy', 'matplotlib', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_wrong_name_is_reported_before_torch_is_imported():
    """Processes of a recipe that does not import torch do not, either: tests of the launcher rely on it."""
    program = (
        "import sys\nfrom torchrecipes.cli.main import main\n"
        "assert main(['run', 'mlm_pretrian']) == main(['run', 'mlm_pretrain', '--config', 'none.yaml']) == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


def test_reading_a_config_does_not_import_torch():
    program = (
        "import sys\nfrom dataclasses import dataclass\nfrom torchrecipes.config import load, to_yaml\n"
        "@dataclass\nclass Config:\n    seed: int = 0\n    other: int = 0\n"
        "print(to_yaml(load(Config, None, ['seed=1', 'other=${seed}'])))\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert python("-c", program).returncode == 0


def test_importing_the_package_costs_nothing():
    program = "import sys; before = set(sys.modules); import torchrecipes; print(*set(sys.modules) - before)"
    assert python("-c", program).stdout.split() == ["torchrecipes"]


@pytest.mark.parametrize("verb", cli.all_verbs())
def test_every_verb_explains_itself_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*verb.split(), "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: tune-style {verb}" in out
    assert "example" in out and f"tune-style {verb}" in out.split("example", 1)[1]
    assert "--debug" in out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_verb(words, capsys):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    assert all(f"  {group} VERB " in out for group in cli.GROUPS)


@pytest.mark.parametrize("group", cli.GROUPS)
def test_a_group_lists_its_verbs_and_suggests_one_for_a_typo(group, capsys):
    verbs = cli.GROUPS[group][1]
    for words in ([group], [group, "--help"], [group, "-h"], [group, "help"]):
        assert cli.main(words) == 0
        out = capsys.readouterr().out
        assert f"usage: tune-style {group} VERB" in out and all(f"  {verb} " in out for verb in verbs)
    name = next(iter(verbs))
    assert cli.main([group, name[1:]]) == 2
    assert f"'{name}'" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"torchrecipes {torchrecipes.__version__}\n"


def test_an_unknown_verb_gets_a_suggestion(capsys):
    assert cli.main(["rnu", "x"]) == 2
    err = capsys.readouterr().err
    assert "'rnu'" in err and "'run'" in err and err.count("\n") == 1
    assert cli.main(["verify"]) == 2
    assert "'data verify'" in capsys.readouterr().err


@pytest.fixture
def verb(monkeypatch):
    """A verb `act`, whose `main` does what the test sets."""
    module = types.ModuleType("verb_of_a_test")
    module.add_arguments = lambda parser: parser.add_argument("words", nargs="*")
    module.main = lambda args: None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.VERBS, "act", (module.__name__, "act as the test says"))
    return module


def raising(error: BaseException):
    def act(args):
        raise error

    return act


class OutOfMemoryError(RuntimeError):
    """Called as torch's own, which is not imported to be recognised."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("config.yaml:3: no such key. Remove it."), 2, "config.yaml:3: no such key. Remove it.\n"),
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 2, "Out of memory. Lower micro_batch_size first"),
        (OutOfMemoryError("Tried 2 GiB\nmore"), 2, "Out of memory on the GPU (Tried 2 GiB). "),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "Out of memory ([enforce fail]"),
        (OSError(errno.ENOSPC, "No space left", "x/model"), 2, "The disk is full (writing x/model). "),
        (OSError(errno.EDQUOT, "Quota exceeded"), 2, "The disk is full. "),
    ],
)
def test_errors_that_a_user_can_fix_are_one_message(verb, capsys, error, code, message):
    verb.main = raising(error)
    assert cli.main(["act"]) == code
    err = capsys.readouterr().err
    assert err.startswith(message) and "Traceback" not in err
    assert bool(err) == bool(message)


def test_debug_shows_the_traceback(verb, capsys):
    verb.main = raising(UserError("it is wrong"))
    assert cli.main(["act", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "UserError: it is wrong" in err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        SystemExit(5),
        BrokenPipeError("a worker's"),
        OSError(errno.ENOENT, "gone"),
        RuntimeError("x"),
    ],
)
def test_bugs_and_exits_pass_through(verb, error):
    verb.main = raising(error)
    with pytest.raises(type(error)) as caught:
        cli.main(["act"])
    assert caught.value is error


def test_an_unknown_option_is_an_error_that_shows_how_to_write_a_setting(verb, capsys):
    for word, setting in {"--lr=1e-3": ": lr=1e-3\n", "--what": "--what\n"}.items():
        with pytest.raises(SystemExit) as stop:
            cli.main(["act", word])
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert f"unknown option {word}" in err and err.endswith(setting)


def test_only_what_is_required_is_called_required(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run"])
    assert capsys.readouterr().err.endswith("required: recipe\n")


def test_options_may_stand_between_the_words(verb):
    seen = []
    verb.main = seen.append
    assert cli.main(["act", "a=1", "--debug", "b=-2"]) == 0
    assert (seen[0].words, seen[0].debug) == (["a=1", "b=-2"], True)


def test_the_installed_command_and_the_module_are_the_same_program(tmp_path):
    command = os.path.join(os.path.dirname(sys.executable), "tune-style")
    installed = subprocess.run([command, "rnu"], capture_output=True, text=True, cwd=tmp_path)
    module = python("-m", "torchrecipes.cli.main", "rnu", cwd=tmp_path)
    assert (installed.returncode, installed.stderr) == (module.returncode, module.stderr)
    assert module.returncode == 2


def test_output_into_a_closed_pipe_is_quiet(tmp_path):
    # The reader closes its end before the first line: as `tune-style ls | true`, without the race.
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "torchrecipes.cli.main", "ls"], stdout=write_end, stderr=subprocess.PIPE, text=True
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")
