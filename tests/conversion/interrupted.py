"""
Kill conversions at random moments and around every rename, and let them run out of space: the target is always the old
folder or the new one, complete, and the same command run again gives the same bytes.

    python tests/conversion/interrupted.py [--kills 200] [--sizes 20]
"""

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from neo_hf import NeoForConditionalGeneration
from neo_hf.conversion import convert_raw_to_hub, target

RAW = Path(__file__).parents[1] / "golden" / "neo_tiny" / "raw"


def digest(folder):
    """Each file of a folder with the hash of its bytes, or `None` if there is no folder."""
    if not folder.exists():
        return None
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def loads(folder):
    try:
        NeoForConditionalGeneration.from_pretrained(folder)
    except Exception:
        return False
    return True


def convert(out, before=lambda: None, **kwargs):
    """Convert in a child process, forked so that it needs no imports. Returns its id."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            before()
            convert_raw_to_hub(RAW, out, **kwargs)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def kill_at_step(step, exchange=True):
    """To call in the child: it is killed before (even) or after (odd) a rename, an exchange or a removal."""
    steps = iter(range(step + 1))

    def killing(function):
        def wrapped(*args, **kwargs):
            for call in (None, lambda: function(*args, **kwargs)):
                result = call() if call else None
                if next(steps) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    def install():
        target._exchange = killing(target._exchange) if exchange else lambda first, second: False
        target.Path.rename = killing(Path.rename)
        target._remove = killing(target._remove)

    return install


def check(out, allowed, work):
    """The target is one of the allowed folders; what stands beside it is no model, or a complete one."""
    assert digest(out) in allowed, f"{out} is neither the old nor the new folder"
    for folder in work.iterdir():
        if folder.is_dir() and folder != out and loads(folder):
            assert digest(folder) in allowed, f"{folder} is incomplete, but loads as a model"


def interrupt(kills, sizes, seed=0):
    """Counts of what was found after each interruption."""
    rng, outcomes = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        out, saved = work / "hub", Path(tempfile.mkdtemp()) / "old"
        convert_raw_to_hub(RAW, saved, max_shard_size="500KB", license="mit")  # the old one differs in every respect
        old = digest(saved)
        start = time.perf_counter()
        convert_raw_to_hub(RAW, out)
        seconds, new = time.perf_counter() - start, digest(out)
        jobs = [("kill", kill_at_step(n, exchange), 0.0) for exchange in (True, False) for n in range(12)][:kills]
        jobs += [("kill", lambda: None, rng.uniform(0, seconds * 1.2)) for _ in range(kills - len(jobs))]
        largest = max(file.stat().st_size for file in out.iterdir())
        limits = [largest * (number + 1) // (sizes + 1) for number in range(sizes)]
        jobs += [("full", partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)), 0.0) for limit in limits]
        for number, (kind, before, delay) in enumerate(jobs):
            force = number % 3 != 0
            shutil.rmtree(out, ignore_errors=True)
            if force:
                shutil.copytree(saved, out)
            child = convert(out, before, force=force)
            if delay:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found = digest(out)
            recovered = found is None and (work / ".hub.replaced").exists()  # between two renames: nothing is lost
            if recovered:
                assert digest(work / ".hub.replaced") == old
            else:
                check(out, [old if force else None, new], work)
            if kind == "full":
                assert {path.name for path in work.iterdir()} <= {"hub"}, "something is left after an error"
            outcomes[kind, "recovered" if recovered else "new" if found == new else "old"] += 1
            _, status = os.waitpid(convert(out, force=True), 0)
            assert status == 0, "the second run failed"
            assert digest(out) == new, "the second run wrote something else"
            assert [path.name for path in work.iterdir()] == ["hub"], "something is left"
        shutil.rmtree(saved.parent)
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--sizes", type=int, default=20)
    arguments = parser.parse_args()
    for (kind, outcome), count in sorted(interrupt(arguments.kills, arguments.sizes).items()):
        print(f"{kind}: {count} times the {outcome} folder")
