"""The command line, `dsv3c`: arguments in, exit status out. The work is done in `commands`.

Exit status: 0 done; 1 the work failed (a certificate, a required pass, a mismatch); 2 the input is at fault.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from codegen.targets import TARGETS

DONE, FAILED, AT_FAULT = 0, 1, 2


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Errors become one line on stderr; --debug adds the traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parser().parse_args(given)
        return run(options)
    except argparse.ArgumentError as error:
        return _report(error, AT_FAULT)
    except KeyboardInterrupt:
        return _report("interrupted", FAILED)
    except BrokenPipeError:
        # The reader of our output (head, less) has seen enough; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if "--debug" in given:
            traceback.print_exc()
        from dsv3_compile.commands import at_fault, failures

        if isinstance(error, at_fault()):
            return _report(error, AT_FAULT)
        if isinstance(error, failures()):
            return _report(error, FAILED)
        return _report(f"unexpected {type(error).__name__}: {error} (--debug shows where)", FAILED)


def run(options: argparse.Namespace) -> int:
    from dsv3_compile import commands

    return getattr(commands, options.command)(options)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="dsv3c", description="Compile models built from MLA and DeepSeekMoE.", exit_on_error=False)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text, exit_on_error=False)
        one.add_argument("--json", action="store_true", help="one JSON document on stdout")
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return one

    model = "preset name, Hugging Face folder or artifact"
    info = command("info", "parameters, cache bytes and operations per token")
    info.add_argument("model", metavar="MODEL", help=model)

    compile_ = command("compile", "compile a model into an artifact")
    compile_.add_argument("model", metavar="MODEL", help="preset name or Hugging Face folder")
    compile_.add_argument("-o", "--output", metavar="DIR", required=True, help="artifact folder to write")
    compile_.add_argument("--target", default="cpu", choices=TARGETS, help="default cpu")
    compile_.add_argument("--from", dest="origin", default="definition", choices=("definition", "transformers"),
                          help="whose layers to compile: ours (default), or transformers' own code")  # fmt: skip
    compile_.add_argument("--no-weights", action="store_true", help="compile from the config alone")
    compile_.add_argument("--dtype", help="float32, bfloat16 or float16")
    compile_.add_argument("--set", metavar="PASS.FIELD=VALUE", action="append", default=[], help="set an option")
    compile_.add_argument("--disable", metavar="PASS", action="append", default=[], help="leave a pass out")
    compile_.add_argument("--require", metavar="PASS", action="append", default=[], help="fail unless it fires")
    compile_.add_argument("--until", metavar="PASS", help="run the passes up to and including this one")
    compile_.add_argument("--repeat", metavar="PASS", action="append", default=[], help="run a pass twice in a row")
    compile_.add_argument("--no-verify", action="store_true", help="skip the certificates")
    compile_.add_argument("--max-batch", metavar="N", type=int, help="rows of a decode step")
    compile_.add_argument("--max-length", metavar="N", type=int, help="positions of the cache")
    compile_.add_argument("--aot", action="store_true", help="cpu: store native code, so that loading compiles nothing")

    generate = command("generate", "continue a prompt")
    generate.add_argument("artifact", metavar="DIR")
    generate.add_argument("--prompt", metavar="TEXT", required=True)
    generate.add_argument("--max-new-tokens", metavar="N", type=int, default=64)
    generate.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 (default): most likely token")
    generate.add_argument("--top-p", metavar="P", type=float, default=1.0)
    generate.add_argument("--seed", metavar="S", type=int, default=0)

    inspect = command("inspect", "what every pass did")
    inspect.add_argument("artifact", metavar="DIR")
    inspect.add_argument("--pass", dest="only", metavar="NAME", help="one pass, with its matches and refusals")
    inspect.add_argument("--block", metavar="NAME", help="one block")
    inspect.add_argument("--phase", metavar="PHASE", help="prefill or decode")
    inspect.add_argument("--diff", action="store_true", help="the graphs before and after, side by side")
    inspect.add_argument("--kernels", action="store_true", help="the kernels in the artifact")
    inspect.add_argument("--html", metavar="FILE", help="write the report as a page")

    verify = command("verify", "hashes, numbers against the reference definition, and the certificates of the passes")
    verify.add_argument("artifact", metavar="DIR")
    verify.add_argument("--no-certificates", action="store_true", help="do not repeat those of the passes")
    verify.add_argument("--checkpoint", metavar="FOLDER", help="where the checkpoint lies now, if it was moved")

    export = command("export", "write a model as ONNX or MLIR")
    export.add_argument("model", metavar="MODEL", help=model)
    export.add_argument("--format", choices=("onnx", "mlir"), required=True)
    export.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write")
    export.add_argument("--dtype", default="float32", help="float32 (default) or float16")
    export.add_argument("--contrib", action="store_true", help="onnx: ONNX Runtime's own MoE and routing operators")
    export.add_argument("--dialect", help="mlir: linalg (default), torch, stablehlo or tosa")
    export.add_argument("--sizes", metavar="BATCH,TOKENS,SLOTS", help="mlir: fixed sizes instead of free ones")
    export.add_argument("--inline", action="store_true", help="mlir: weights as constants instead of arguments")
    export.add_argument("--no-verify", action="store_true", help="skip the certificates of the passes")

    bench = command("bench", "prefill and decode, against the floor of this machine")
    bench.add_argument("artifact", metavar="DIR")

    command("passes", "the pipeline, with each pass's options")
    return top


def _report(error: object, status: int) -> int:
    line = " ".join(str(error).split())
    print(f"dsv3c: error: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
