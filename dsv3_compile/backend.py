"""`torch.compile(model, backend="dsv3")`: the passes on whatever graph Dynamo traced, and Inductor behind them.

    Dynamo's graph → functional ATen → passes, certified region by region → Inductor

For inference. A graph that the passes leave as it was goes to Inductor untouched; so does one that they cannot read
or on which one of them stops, and a graph that trains. `last_report()` says what happened, and why.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import disable_fake_tensor_cache

from codegen import dispatch
from codegen.targets import TARGETS, Target
from dsv3_compile.autocast import surrounding, switched_off
from dsv3_compile.free_floats import fix_floats_of_modules, free_floats
from dsv3_compile.functional import Functional, NotFunctional, callable_again, functional, why_unreadable
from dsv3_compile.held import hold_shared
from dsv3_compile.in_place import count_together, write_in_place
from dsv3_compile.inspection import Report, block_document, header, print_graph
from dsv3_compile.options import OptionError, strings
from passes.base import Context, Workload, fake_mode_of, placeholders, state
from passes.certify import RegionalSpecimen
from passes.pipeline import (
    FOREIGN_GPU_PIPELINE,
    FOREIGN_PIPELINE,
    PassRecord,
    Pipeline,
    RequirementError,
    check_required,
)
from passes.plan import NoSuchForm
from passes.settings import PassError

LOGGER = logging.getLogger(__name__)

KEPT_REPORTS = 64
_reports: deque[tuple[int, Report]] = deque(maxlen=KEPT_REPORTS)  # with the number of the graph


@dataclass(frozen=True)
class Settings:
    """Options of the backend: `torch.compile(model, backend="dsv3", options={"disable": ("fuse-swiglu",)})`.

    Options with other names are Inductor's. Raises OptionError for a value that an option does not take, and for a
    pass that is both required and left out.
    """

    set: tuple[str, ...] = ()  # pass.field=value
    disable: tuple[str, ...] = ()  # passes left out
    require: tuple[str, ...] = ()  # passes that must fire in every graph
    verify: bool = True  # certify every pass

    def __post_init__(self) -> None:
        for name in ("set", "disable", "require"):
            object.__setattr__(self, name, strings(name, getattr(self, name)))
        if not isinstance(self.verify, bool):
            raise OptionError(f"verify is {self.verify!r}; accepted: True, False")
        for name in self.require:
            if name in self.disable:
                raise OptionError(f"pass {name!r} is both required and disabled")


def dsv3(
    traced: fx.GraphModule,
    examples: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph; the entry point "dsv3" of torch.compile, which takes `mode` and `options`.

    Raises OptionError or PassError for an option, a pass or an option of one that does not exist, RequirementError
    when a required pass found nothing, or did not run because the graph falls back.
    """
    settings, others = split_options(options)
    configured(settings, target_of(examples))  # a graph that falls back would hide a wrong option
    reason = _why_not(examples)
    if not reason:
        fix_floats_of_modules(traced)
        floats = ", ".join(node.name for node in free_floats(traced))
        reason = f"a float may change from call to call, and no pass can read it: {floats}" if floats else ""
    found = None
    if not reason:
        try:
            found = functional(traced)
        except NotFunctional as problem:
            reason = str(problem)
    if found is None:
        _leave(examples, settings, reason)
        return inductor(traced, examples, mode, others)
    changed, _ = improve(found, examples, settings, lambda: given_integers(found.module, examples))
    if not changed:
        return inductor(traced, examples, mode, others)
    with switched_off():
        compiled = inductor(callable_again(found), examples, mode, others)
    return switched_off()(compiled) if surrounding() else compiled  # where autocast is on, the graph casts itself


def split_options(options: Mapping[str, Any] | None) -> tuple[Settings, dict[str, Any]]:
    """Those of the backend, and those of Inductor."""
    own = {name: value for name, value in (options or {}).items() if name in Settings.__dataclass_fields__}
    return Settings(**own), {name: value for name, value in (options or {}).items() if name not in own}


def configured(settings: Settings, target: Target) -> Pipeline:
    """The passes for a target, set as asked. PassError for a pass, an option of one or a value that does not exist."""
    pipeline = Pipeline(FOREIGN_PIPELINE if target.backend == "cpu" else FOREIGN_GPU_PIPELINE)
    for name in settings.require:
        pipeline.find(name)
    return pipeline.configured(settings.set, settings.disable)


def improve(
    found: Functional, examples: Sequence[Any], settings: Settings, given: Callable[[], Mapping[str, Tensor]]
) -> tuple[bool, Report]:
    """Send a graph through the passes and put kernels into it, in place: whether it is to be used, and the report.

    given: integers and masks by input name, for the certificates. A graph on which a step of this stops, or that a pass
    changed according to its certificate, is one that we cannot read, and no reason to keep it from running: the log and
    the report's `fallback` name step and exception. Where passes are required, the exception is raised.
    """
    reason = why_unreadable(found)
    if reason:
        return False, _leave(examples, settings, reason)
    target, steps = target_of(examples), ["reading the graph"]
    try:
        gained, records = _run_passes(found, target, settings, given(), lambda name, number: steps.append(name))
        if gained:
            steps.append("lowering")
            lower(found, target)
        steps.append("writing the report")
        return gained, _publish(records, examples, settings, "")
    except (NoSuchForm, PassError, RequirementError):
        raise
    except Exception as problem:
        if settings.require:
            raise
        text = next(iter(str(problem).splitlines()), "")
        reason = f"{steps[-1]} stopped with {type(problem).__name__}: {text}"
        LOGGER.warning("%s; the graph goes to Inductor as it came", reason, exc_info=True)
        return False, _publish([], examples, settings, reason)


def _leave(examples: Sequence[Any], settings: Settings, reason: str) -> Report:
    """The published report of a graph that no pass has seen. RequirementError where one had to."""
    report = _publish([], examples, settings, reason)
    if settings.require:
        raise RequirementError(f"required pass {settings.require[0]} did not run: {reason}")
    return report


def _run_passes(
    found: Functional,
    target: Target,
    settings: Settings,
    given: Mapping[str, Tensor],
    step: Callable[[str, int], None],
) -> tuple[bool, list[PassRecord]]:
    """Whether that was worth it, and what each pass did; `step` is told its name before it runs.

    Raises RequirementError when a required pass did nothing.
    """
    if target.backend != "cpu":
        dispatch.register(target)
    context = Context("any", target, Workload(0, 0, 0))
    specimen = RegionalSpecimen(found.module, given) if settings.verify else None
    pipeline = configured(settings, target)
    # With symbols for sizes, to rebuild a known fake result takes longer than to find it anew.
    with disable_fake_tensor_cache(fake_mode_of(found.module.graph)):
        records = pipeline.run(found.module, context, f"graph {_next_number()}", specimen, step, _Printer())
    check_required(records, settings.require)
    return any(r.matches for one, r in zip(pipeline.passes, records, strict=True) if not one.prepares), records


def lower(found: Functional, target: Target) -> None:
    """Let a graph write into the caller's caches and call the target's kernels."""
    if target.backend != "cpu":
        write_in_place(found)
        count_together(found)
        hold_shared(found.module.graph, target)
    dispatch.call_kernels(found.module.graph, target)
    found.module.recompile()


def last_report() -> Report:
    """What the backend did to the graph it compiled last: the document of `inspect`, with one block; printed, a table.

    `fallback` says why the graph went to plain Inductor without passes, or is empty; `uncertified` lists what was
    too large to be run before and after, by pass. ValueError when nothing was compiled yet.
    """
    if not _reports:
        raise ValueError("the backend has compiled nothing in this process yet")
    return _reports[-1][1]


def reports() -> list[Report]:
    """The reports of the graphs compiled so far, oldest first; the last KEPT_REPORTS are kept."""
    return [report for _, report in _reports]


def _next_number() -> int:
    """Of the graph that is compiled next; the reports that are kept may be fewer."""
    return _reports[-1][0] + 1 if _reports else 0


def _why_not(examples: Sequence[Any]) -> str:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in examples):
        return "the graph trains: the passes are for inference (call the model under torch.no_grad)"
    return ""


def given_integers(module: fx.GraphModule, examples: Sequence[Any]) -> dict[str, Tensor]:
    """Integers and masks that the graph was traced with, by input: positions and indices cannot be drawn at random."""
    return {
        node.name: example.detach().cpu()
        for node, example in zip(placeholders(module.graph), examples, strict=True)
        if isinstance(example, Tensor)
        and not isinstance(example, torch._subclasses.FakeTensor)
        and not example.is_floating_point()
    }


def target_of(examples: Sequence[Any]) -> Target:
    """The machine that the inputs lie on; of a GPU that nobody described, the closest older one."""
    device = next((x.device for x in examples if isinstance(x, Tensor) and x.device.type == "cuda"), None)
    if device is None:
        return TARGETS["cpu"]
    if torch.version.hip:
        return TARGETS["gfx942"]
    major, minor = torch.cuda.get_device_capability(device)
    older = [one for one in TARGETS.values() if one.backend == "cuda" and int(one.arch) <= 10 * major + minor]
    return max(older, key=lambda one: int(one.arch), default=TARGETS["sm_80"])


class _Printer:
    """Prints a graph unless it is the one it printed last: the text of a whole model is long."""

    def __init__(self) -> None:
        self.state: list[Any] | None = None
        self.text = ""

    def __call__(self, module: fx.GraphModule) -> str:
        now = state(module.graph)
        if now != self.state:
            self.state, self.text = now, self._printed(module)
        return self.text

    @staticmethod
    def _printed(module: fx.GraphModule) -> str:
        try:
            return print_graph(module)
        except ValueError:  # somebody's graph may hold what has no source, such as large constants
            return str(module.graph)


def inductor(
    module: fx.GraphModule, examples: Sequence[Any], mode: str | None, options: Mapping[str, Any]
) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **options}
    patches = {name.replace("-", "_"): value for name, value in patches.items()}
    return cast(Callable[..., Any], compile_fx(module, list(examples), config_patches=patches))


def _publish(records: list[PassRecord], examples: Sequence[Any], settings: Settings, fallback: str) -> Report:
    number, target = _next_number(), target_of(examples)
    dtype = next((x.dtype for x in examples if isinstance(x, Tensor) and x.is_floating_point()), torch.float32)
    skipped = [
        {"pass": record.name, "reason": line}
        for record in records
        for line in (record.certificate.skipped if record.certificate else ())
    ]
    report = Report(
        **header("", target, dtype, repr(settings)),
        blocks=[block_document(f"graph {number}", "any", [], records, None, target)],
        phase_plans=[],
        fallback=fallback,
        uncertified=skipped,
    )
    _reports.append((number, report))
    LOGGER.info("graph %d: %s", number, fallback or _summary(records) or "nothing to improve")
    return report


def _summary(records: Sequence[PassRecord]) -> str:
    return ", ".join(f"{record.name} {len(record.matches)}" for record in records if record.matches)
