"""Checks and measures Galerne on this machine's GPU, beside torch and transformers if they are there.

    python3 run.py [--minutes 8] [--only WORD] [--out FOLDER]

Each section runs in a process of its own, with a limit of its own; one that fails, hangs or cannot start is recorded as such
with what it said, and the next one begins. Prints a table last, and writes report.json and report.md.
"""

import argparse
import dataclasses
import glob
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
# Of what a section says where it fails: the end says most.
SAID_MAX = 2_000
TEST = re.compile(r"test (\S+) \.\.\. (ok|FAILED)")


@dataclasses.dataclass
class Section:
    name: str
    seconds: int
    command: list
    # What it needs and this machine, or this kit, lacks.
    missing: str = ""
    environment: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outcome:
    name: str
    ended: str
    seconds: float
    figures: list
    said: str


def sections(galerne, tests, device, quick):
    """What matters most comes first: the last ones may find no time."""
    small, large = ("tiny", "tiny") if quick else ("smollm2", "llama8b")
    batch, context, steps = ("1,2", "64", "4") if quick else ("1,16,64", "2048", "32")
    check = [galerne, "--data", str(pathlib.Path(tempfile.gettempdir()) / "galerne-gpu-kit"), "gpu-check", "--device", device]
    # Kernels that follow each other without a gap, and those that only Hopper has.
    unchecked = [word if word != "cuda" else "cuda-unchecked" for word in check]
    decode = ["decode", "--shape", large, "--batch", batch, "--context", context, "--steps", steps]
    tokens = ["tokens", "--shape", small, "--steps", "4" if quick else "24"]
    torch_args = ["--quick"] if quick else []
    python = sys.executable
    tiny = ["tokens", "--shape", "tiny", "--steps", "2", "--precision"]
    torch_decode = [python, str(HERE / "torch_decode.py"), "--batch", batch, "--context", context, "--steps", steps, *torch_args]
    fp8 = ["--quantize", "fp8", "--kv-dtype", "fp8"]
    return [
        Section("info", 30, check + ["info"]),
        Section("conformance f32", 60, check + ["conformance", "--precision", "f32"]),
        Section("conformance auto", 60, check + ["conformance", "--precision", "auto"]),
        *against_float64(tests),
        Section("copy and torch's kernels", 75, [python, str(HERE / "torch_kernels.py"), *torch_args]),
        Section("kernels", 75, check + ["kernels"] + (["--quick"] if quick else [])),
        Section("tokens f32", 45, check + tokens + ["--precision", "f32", "--weights", "q8_0"]),
        Section("tokens auto", 45, check + tokens + ["--precision", "auto"]),
        Section("tokens auto fp8", 45, check + tokens + ["--precision", "auto", "--quantize", "fp8"]),
        Section("tokens f32 nvfp4", 45, check + tokens + ["--precision", "f32", "--quantize", "nvfp4"]),
        Section("decode bf16", 75, check + decode),
        Section("decode fp8", 75, check + decode + fp8),
        Section("transformers bf16", 150, torch_decode),
        Section("decode int4", 75, check + decode + ["--quantize", "int4"]),
        Section("decode nvfp4", 75, check + decode + ["--quantize", "nvfp4"]),
        Section("decode 8 bits", 75, check + decode + ["--weights", "q8_0"]),
        sanitized("memcheck f32", "memcheck", check + tiny + ["f32"]),
        sanitized("memcheck auto", "memcheck", check + tiny + ["auto", *fp8]),
        sanitized("racecheck auto", "racecheck", check + tiny + ["auto"]),
        *sanitized_kernels(tests),
        Section("conformance unchecked", 60, unchecked + ["conformance", "--precision", "auto"]),
        Section("decode unchecked", 60, unchecked + decode),
        Section("transformers fp8", 150, torch_decode + ["--dtype", "fp8"]),
    ]


def against_float64(tests):
    """The tests of each kernel, which run on the shim elsewhere."""
    programs = sorted(tests.glob("cuda_*")) if tests else []
    if not programs:
        return [Section("float64", 0, [], "this kit has no tests of kernels")]
    return [Section("float64 " + program.name.removeprefix("cuda_"), 60, [str(program)], environment=kernels(tests))
            for program in programs]


def kernels(tests):
    """What makes the tests run on the GPU."""
    return {"GALERNE_TEST_CUDA": str(tests / "kernels.bin")}


def sanitized(name, tool, command, environment={}):
    program = sanitizer()
    missing = "" if program else "compute-sanitizer is not on this machine"
    return Section(name, 60, [program, "--error-exitcode", "9", "--tool", tool, *command], missing, environment)


def sanitized_kernels(tests):
    """Those that read the most formats."""
    cases = [("linear", "formats_made_from_numbers"), ("attention", "decode_reads_each_dtype_and_width")]
    return [sanitized(f"memcheck {name}", "memcheck", [str(tests / f"cuda_{name}"), case, "--test-threads", "1"], kernels(tests))
            for name, case in cases if tests]


def sanitizer():
    """Where CUDA's toolkit and its packages for Python put it, if there is one."""
    name = "compute-sanitizer"
    roots = [*glob.glob("/usr/local/cuda*"), *glob.glob("/opt/cuda*"), *glob.glob("/opt/nvidia/*"),
             *(root for folder in sys.path for root in glob.glob(os.path.join(folder or ".", "nvidia", "*")))]
    places = [os.path.join(root, *folders, name) for root in roots for folders in (["bin"], [name], [])]
    found = [place for place in places if os.path.isfile(place) and os.access(place, os.X_OK)]
    return shutil.which(name) or (found[0] if found else None)


def environment():
    """With the cuBLASLt that torch brought, if there is one: galerne looks only where the system's libraries are."""
    brought = [str(library.parent) for folder in sys.path
               for library in pathlib.Path(folder or ".").glob("nvidia/*/lib/libcublasLt.so.*")]
    known = os.environ.get("LD_LIBRARY_PATH")
    folders = ([known] if known else []) + brought[:1]
    return {**os.environ, **({"LD_LIBRARY_PATH": ":".join(folders)} if folders else {})}


def run(section, seconds):
    begin = time.monotonic()
    if section.missing:
        return Outcome(section.name, "skipped", 0.0, [], section.missing)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            # A session of its own: what it started ends with it.
            process = subprocess.Popen(section.command, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                       env={**environment(), **section.environment}, start_new_session=True)
        except OSError as error:
            return Outcome(section.name, "failed", 0.0, [], f"{section.command[0]}: {error}")
        try:
            code = process.wait(seconds)
            ended = "ran" if code == 0 else "failed"
            said = f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            ended, said = "failed", f"not done after {seconds:.0f} s"
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        # A process that the driver holds may not end even so; nobody waits for it for long.
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            said += ", and it cannot be killed"
        figures, others = read_figures(out)
        err.seek(0)
        if ended == "failed":
            said = "\n".join(filter(None, [said, others, err.read().decode(errors="replace").strip()]))
    return Outcome(section.name, ended, time.monotonic() - begin, figures, said[-SAID_MAX:])


def read_figures(out):
    """Lines of JSON objects with a name, and what tests in Rust say of each; and the other lines."""
    out.seek(0)
    figures, others = [], []
    for line in out.read().decode(errors="replace").splitlines():
        if test := TEST.fullmatch(line):
            figures.append({"name": test[1], "passed": test[2] == "ok"})
            continue
        try:
            figure = json.loads(line)
            is_figure = isinstance(figure, dict) and isinstance(figure.get("name"), str)
        except ValueError:
            is_figure = False
        if is_figure:
            figures.append(figure)
        else:
            others.append(line)
    return figures, "\n".join(others)


def copy_rate(outcomes):
    """Bytes per second read and written by a device-to-device copy in this run."""
    for outcome in outcomes:
        for figure in outcome.figures:
            if figure["name"] == "copy" and figure.get("value"):
                return figure["value"] * 1e9
    return None


def ratio(figure, peer):
    """How many times as fast."""
    is_rate = figure["unit"].endswith("/s")
    return figure["value"] / peer["value"] if is_rate else peer["value"] / figure["value"]


def rows(outcomes):
    """A row for each section's end where it did not run well, and for each figure; conformance only where it fails."""
    copy = copy_rate(outcomes)
    named = [f for outcome in outcomes for f in outcome.figures if f.get("value")]
    for outcome in outcomes:
        cases = [f for f in outcome.figures if f.get("passed") is not None]
        failed = [f for f in cases if not f["passed"]]
        result = f"{len(cases) - len(failed)} of {len(cases)} passed" if cases else outcome.ended
        # A section that ends well has said nothing of how; its figures follow.
        said = outcome.said.splitlines()[-1] if outcome.said else ""
        state = "ran" if outcome.ended == "ran" and not failed else outcome.ended if outcome.ended != "ran" else "failed"
        yield f"**{outcome.name}**", state, result, said
        for figure in outcome.figures:
            if figure.get("passed") is True and figure.get("value") is None:
                continue
            value = figure.get("value")
            text = "" if value is None else f"{value:,.4g} {figure.get('unit', '')}"
            note = figure.get("note", "")
            said = [note] if note else []
            if figure.get("bytes_per_s") and copy:
                said.insert(0, f"{figure['bytes_per_s'] / copy:.2f} of the copy's rate")
            said += [f"{ratio(figure, peer):.2f} x {peer['name'].split(' ')[0]}"
                     for peer in named if peer["name"] in figure.get("peers", []) and value]
            note = "; ".join(said)
            state = {True: "passed", False: "FAILED", None: ""}[figure.get("passed")]
            yield figure["name"], state, text, note


def markdown(outcomes, machine):
    def cell(text):
        return text.replace("|", "\\|").replace("\n", " ")

    lines = ["# Galerne on a GPU", "", machine, "", "| | | | |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell(part) for part in row) + " |" for row in rows(outcomes)]
    failures = [outcome for outcome in outcomes if outcome.said]
    for outcome in failures:
        lines += ["", f"## {outcome.name}: {outcome.ended}", "", "```", outcome.said, "```"]
    return "\n".join(lines) + "\n"


def machine():
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
        gpu = answer.stdout.strip() or answer.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        gpu = f"nvidia-smi: {error}"
    return f"{gpu}; {os.cpu_count()} CPUs; {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"


def unpacked(folder):
    """The binary and the tests of kernels, which the kit carries compressed."""
    with tarfile.open(HERE / "programs.tar.xz") as programs:
        programs.extractall(folder)
    return str(pathlib.Path(folder) / "galerne"), pathlib.Path(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", default="", help="sections whose names contain this")
    parser.add_argument("--out", default=".", help="where report.json and report.md go")
    parser.add_argument("--galerne", help="a binary instead of the kit's")
    parser.add_argument("--tests", type=pathlib.Path, help="with --galerne: a folder with tests of kernels and kernels.bin")
    parser.add_argument("--device", default="cuda", help="cpu tries the kit itself")
    parser.add_argument("--quick", action="store_true", help="sizes that say nothing of speed")
    args = parser.parse_args()
    deadline = time.monotonic() + args.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        galerne, tests = (args.galerne, args.tests) if args.galerne else unpacked(folder)
        outcomes = []
        for section in sections(galerne, tests, args.device, args.quick):
            if args.only not in section.name:
                continue
            left = deadline - time.monotonic()
            if left < 5:
                outcomes.append(Outcome(section.name, "skipped", 0.0, [], "no time was left"))
                continue
            print(f"{section.name} …", file=sys.stderr, flush=True)
            outcomes.append(run(section, min(section.seconds, left)))
            print(f"  {outcomes[-1].ended} in {outcomes[-1].seconds:.0f} s", file=sys.stderr, flush=True)
            write(args, outcomes)
        # Those for which no time was left, too.
        write(args, outcomes)
    for row in rows(outcomes):
        print("{:<64} {:<8} {:>24}  {}".format(row[0].strip("*")[:64], row[1], row[2], row[3][:90]))


def write(args, outcomes):
    """After each section: what is there survives whatever comes."""
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "sections": [dataclasses.asdict(outcome) for outcome in outcomes]}
    (out / "report.json").write_text(json.dumps(report, indent=1))
    (out / "report.md").write_text(markdown(outcomes, report["machine"]))


if __name__ == "__main__":
    main()
