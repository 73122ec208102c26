"""The command line starts without torch, so that help answers at once."""

import subprocess
import sys
import time


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_command_line_does_not_import_torch() -> None:
    code = "import sys, gtrans.cli.main; print([m for m in ('torch', 'rich') if m in sys.modules])"
    assert _python(code) == "[]\n"


def test_help_answers_at_once() -> None:
    # The fastest of several runs, since other work on the machine only ever makes one slower.
    def fastest(code: str) -> float:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            _python(code)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    bare = fastest("pass")
    with_help = fastest(
        "import sys; sys.argv = ['gtrans', '--help']; from gtrans.cli.main import main; main()"
    )

    # On a busy machine both take longer; importing torch alone takes some forty times as long.
    assert with_help < max(0.15, 7 * bare)
