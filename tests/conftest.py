"""Hostile settings for every test: several devices, no network, warnings as errors, no silent skips."""

import gc
import os
import pathlib

import hypothesis
import pytest

# Before jax is imported: it reads these once.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# With as few threads as devices, independent collectives of one XLA program may wait for each other forever.
os.environ["NPROC"] = "64"
os.environ.pop("COLUMNS", None)  # workers are told a terminal's width, by which tables would fold
os.environ["HF_HUB_OFFLINE"] = "1"
# Two workers, and the commands of one run of CI, compile many a program that another has compiled.
COMPILED = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # grain forks; tokenizers warns when it has already made threads

# Tracing makes millions of small objects, few of them garbage: look less often.
gc.set_threshold(200_000, 50, 100)

# Scripts that run the references, which aren't installed for the tests; what pyright alone reads.
collect_ignore_glob = ["golden/*", "typed.py"]

# Compilation makes the first example of a property slow: a deadline would only measure that.
hypothesis.settings.register_profile("lora_jax", deadline=None, derandomize=True, max_examples=30)
# For `make mutants`: that an example fails is enough there.
phases = [phase for phase in hypothesis.Phase if phase not in (hypothesis.Phase.shrink, hypothesis.Phase.explain)]
hypothesis.settings.register_profile("unshrunk", hypothesis.settings.get_profile("lora_jax"), phases=phases)
hypothesis.settings.load_profile("lora_jax")


KINDS = ("real", "browser", "oracle", "tpu", "slow")  # options and marks; a test is of the first kind that marks it


def pytest_configure(config):
    """Most runs compile with few of XLA's optimizations, in far less time; the comparisons compile as users do.

    Sums may round otherwise then, and more memory is taken. What promises bits, or measures what XLA makes, is marked
    `optimized` and runs under `--optimized`: that start == base bit for bit is a promise to those who set nothing.
    """
    if any(config.getoption(f"--{kind}") for kind in KINDS if kind != "slow") or config.getoption("--optimized"):
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
    else:
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
        # Each fusion has an MLIR pipeline of its own otherwise, which takes two thirds of what compiling then takes.
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
        # A program is cut into as many as 32 modules otherwise, each compiled on its own: a fifth more work.
        os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"


def pytest_addoption(parser):
    parser.addoption(
        "--oracle", action="store_true", help="only the comparisons with torch and PEFT, live and not with golden files"
    )
    parser.addoption("--browser", action="store_true", help="only the tests that open reports in headless Chromium")
    parser.addoption("--tpu", action="store_true", help="only the tests that compile with libtpu (no TPU is needed)")
    parser.addoption("--slow", action="store_true", help="only the tests that are left out of a run without options")
    parser.addoption(
        "--optimized", action="store_true", help="only the tests that need all of XLA's optimizations, fast and slow"
    )
    parser.addoption("--real", metavar="DIR", help="only the tests on published weights and data, which DIR holds")


@pytest.fixture(scope="session")
def real(request):
    """The folder of published weights and data."""
    return pathlib.Path(request.config.getoption("--real"))


@pytest.fixture(scope="session")
def live(request):
    """Whether references are run, rather than read from the golden files: a test that asks for it runs both ways."""
    return request.config.getoption("--oracle")


def pytest_collection_modifyitems(config, items):
    asked = [kind for kind in KINDS if config.getoption(f"--{kind}")]

    def chosen(item):
        kind = next((kind for kind in KINDS if item.get_closest_marker(kind)), None)
        optimized = item.get_closest_marker("optimized") is not None and kind in (None, "slow")
        if config.getoption("--optimized"):
            return optimized
        lives = "oracle" in asked and "live" in getattr(item, "fixturenames", ())
        return lives or (kind in asked and not optimized if asked else kind is None)

    config.hook.pytest_deselected(items=[item for item in items if not chosen(item)])
    items[:] = [item for item in items if chosen(item)]


def _skipped(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")  # absent in a worker: the controller hears of all
    return reporter.stats.get("skipped", []) if reporter else []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """A test that doesn't run is a failure: what needs torch is deselected, nothing else has a reason to skip."""
    if exitstatus == pytest.ExitCode.OK and _skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    for report in _skipped(config):
        terminalreporter.write_line(f"FAILED {report.nodeid}: skipped, and a skip fails the run", red=True)
