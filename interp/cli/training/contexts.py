"""Lorsas of a run of `interp train`, and the contexts that they are trained on."""

from typing import TYPE_CHECKING, Any

from interp.dictionaries import Job
from interp.dictionaries.activations import ActivationStore, ActivationStream, Contexts, Prefetch, harvest
from interp.dictionaries.lorsa import AttentionPairs, AttentionRule, attention_rule, from_heads, shaped
from interp.errors import SettingsError
from interp.reads import Read

if TYPE_CHECKING:
    from interp.data.corpora import Corpus
    from interp.dictionaries.activations import Source
    from interp.dictionaries.training import Processes
    from interp.lens import Lens

SAMPLE = 4096
"""Tokens from which active subspaces are taken, at least."""


def begun(
    kind: str, settings: Any, lens: "Lens", texts: "Corpus", processes: "Processes"
) -> tuple[AttentionPairs, dict[str, Job]]:
    """This process's share of what the layers read and write, and the Lorsas by name."""
    world = processes.world
    if settings.contexts % world:
        raise SettingsError(f"the {settings.contexts} contexts of a step cannot be shared by {world} processes alike.")
    tower = settings.tower or lens.anatomy.main
    layers = [Read(site, layers=(n,), tower=tower) for n in settings.layers() for site in ("resid_pre", "z")]
    options = settings.stream_options()
    # All processes measure the layer, and take first weights, on the same contexts: those of a single one.
    first = ActivationStream(lens, texts, layers, **options, batch=settings.contexts)
    sample = [next(first)]
    plain = tower == lens.anatomy.main and lens.anatomy.embed is not None
    batch = None if plain else first.inputs
    while sum(item.used for item in sample) < SAMPLE and len(sample) < SAMPLE:
        sample.append(next(first))
    numbers = dict.fromkeys(Read.of(read).layers[0] for read in first.reads)  # type: ignore[index]
    whole = Contexts.joined(sample)
    longest = max(settings.context, whole.mask.shape[1])  # pictures with prompts have their own length
    rules = [attention_rule(lens, n, batch, tower=tower, context=longest) for n in numbers]
    share = ActivationStream(
        lens, texts, list(first.reads), **options, batch=settings.contexts // world, rank=processes.rank, world=world
    )
    pairs = AttentionPairs(share, rules)
    return pairs, jobs_of(settings, pairs, whole, lens)


def jobs_of(settings: Any, pairs: AttentionPairs, sample: Contexts, lens: "Lens") -> dict[str, Job]:
    """The Lorsas by name, such as `attn.8-topk-k64-subspace-outputs`."""
    jobs = {}
    for rule, (read, target) in zip(pairs.rules, pairs.reads, strict=True):
        before = "" if rule.tower == lens.anatomy.main else f"{rule.tower}-"
        heads = settings.heads(rule.W_Q.shape[1], rule.W_Q.shape[0])
        for options in settings.lorsas():
            sized = [f"k{options['k']:g}"] if "k" in options else []
            for init in settings.inits():
                lorsa = _lorsa(rule, init, sample, {**heads, **options}).freeze_qk(settings.freeze_qk)
                lorsa.metadata |= {"init": init, "freeze_qk": settings.freeze_qk}
                name = "-".join([f"{before}attn.{rule.layer}", options["architecture"], *sized, init])
                jobs[name] = Job(lorsa, read, target)
    return jobs


def _lorsa(rule: AttentionRule, init: str, sample: Contexts, options: dict[str, Any]) -> Any:
    if init == "random":
        return shaped(rule, **options)
    if init == "heads":
        return from_heads(rule, **options)
    x: Any = rule.inputs(sample[rule.reads[0]])
    subspace: Any = init.removeprefix("subspace-")
    return from_heads(rule, **options, x=x, real=sample.real, subspace=subspace)


def source_of(settings: Any, pairs: AttentionPairs, processes: "Processes", say: Any) -> "Source[Contexts]":
    """Contexts of this process: from the model, or from the store where one is named."""
    device, world = pairs.rules[0].W_Q.device, processes.world
    # On a CPU a thread that reads ahead would take the cores of the training.
    ahead: Any = Prefetch(pairs) if device.type == "cuda" else pairs
    if settings.store is None:
        return ahead
    say(f"activations are kept in {settings.store}")
    tokens = -(-settings.tokens // world)
    harvest(ahead, settings.store, tokens=tokens, dtype=settings.store_dtype, keep="contexts")
    ahead.close()
    processes.wait()
    options: dict[str, Any] = {"batch": settings.contexts, "seed": settings.seed, "epochs": None, "device": device}
    return ActivationStore(settings.store).contexts(**options, rank=processes.rank, world=world)
