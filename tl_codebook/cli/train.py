"""``tl-codebook train``: from a language model and texts to a codebook model and a table of what it costs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tl_codebook.errors import ConfigError, DataError, TrainingError
from tl_codebook.files import check_writable, replace_json

__all__ = ["RunArguments", "run"]


@dataclass
class RunArguments:
    """What to train on what."""

    model: str = field(metadata={"help": "Hugging Face folder or hub name of a causal language model."})
    dataset: str = field(metadata={"help": "Hub name, folder, or .jsonl, .json, .csv, .parquet or .txt file with texts."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out texts; by default the last twentieth of the rows."})
    sites: list[str] = field(default_factory=lambda: ["z", "mlp_out"], metadata={"help": "Sites that get a codebook at every layer."})
    layers: list[int] | None = field(default=None, metadata={"help": "Layers; all by default."})
    n_codes: list[int] = field(default_factory=lambda: [1024], metadata={"help": "Codes per group: one number, or one for each site."})
    k: list[int] = field(default_factory=lambda: [8], metadata={"help": "Codes at a time: one number, or one for each site."})
    n_groups: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Codebooks side by side: one number, or one for each site; 0 is one a head at z, q, k, v and one elsewhere."},
    )
    selection: Literal["residual", "nearest"] | None = field(
        default=None, metadata={"help": "residual (greedy pursuit) or nearest (the k most similar); by default that of the recipe."}
    )
    recipe: str = field(default="default", metadata={"help": "default, paper (Tamkin et al. 2023), or none (the model without codebooks)."})
    host: Literal["hooked", "bridge"] | None = field(
        default=None, metadata={"help": "hooked or bridge; HookedTransformer where TransformerLens has it."}
    )
    context_length: int | None = field(default=None, metadata={"help": "Tokens in a row; the model's context, at most 512, by default."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in --output_dir."})


def run(argv: Sequence[str]) -> int:
    """Parse the arguments, train, print the table, save the model and ``results.json``."""
    from transformers import HfArgumentParser, TrainingArguments, set_seed

    from tl_codebook.training import CodebookTrainingConfig

    kinds: Any = (RunArguments, CodebookTrainingConfig, TrainingArguments)
    parser: Any = HfArgumentParser(kinds, prog="tl-codebook train", description=__doc__)
    parser.set_defaults(
        report_to="none", eval_strategy="no", logging_steps=25, warmup_steps=10, lr_scheduler_type="cosine", learning_rate=5e-4
    )
    what: RunArguments
    config: CodebookTrainingConfig
    try:
        what, config, args = parser.parse_args_into_dataclasses(args=_with_config_file(list(argv)))
    except ConfigError:
        raise
    except ValueError as error:  # an unknown option, or values that TrainingArguments does not take together
        parser.error(str(error))
    if what.recipe not in ("default", "paper", "none"):
        raise ConfigError(f"recipe={what.recipe!r} is not known. Choose 'default', 'paper' or 'none'.")
    if what.recipe == "paper":
        asked = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
        config = CodebookTrainingConfig.paper(**asked)
    check_writable(args.output_dir, overwrite=True)
    finished = Path(args.output_dir) / "results.json"
    if finished.exists() and not what.resume:
        raise TrainingError(f"{args.output_dir} holds a finished run. Choose another --output_dir, or --resume.")
    set_seed(args.seed)
    results = _train(what, config, args) | {"command": shlex.join(["tl-codebook", "train", *argv])}
    if args.should_save:
        replace_json(finished, results)
        print(_table(results))
        print(
            f"\nsaved to {args.output_dir}"
            + ("" if what.recipe == "none" else f"; load it with tl_codebook.load({str(Path(args.output_dir) / 'model')!r})")
        )
    return 0


def _with_config_file(argv: list[str]) -> list[str]:
    """Put the values of ``--config run.yaml`` before the other arguments, which win."""
    if "--config" not in argv:
        return argv
    import yaml

    at = argv.index("--config")
    if at + 1 == len(argv):
        raise ConfigError("--config was given without a file. Give --config run.yaml.")
    path = Path(argv[at + 1])
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML ({error}). Give a file of lines such as 'max_steps: 300'.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds a {type(settings).__name__}, not settings. Give lines such as 'max_steps: 300'.")
    given: list[str] = []
    for key, value in settings.items():
        if value is not None:
            given += [f"--{key}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return given + argv[:at] + argv[at + 2 :]


def _per_site(values: Sequence[int], sites: Sequence[str], what: str) -> list[int]:
    if len(values) == 1:
        return list(values) * len(sites)
    if len(values) != len(sites):
        raise ConfigError(f"--{what} has {len(values)} values for {len(sites)} sites ({' '.join(sites)}). Give one, or one for each site.")
    return list(values)


def _codebooks(what: RunArguments) -> dict[str, Any]:
    """Return the configuration of each site."""
    from tl_codebook import CodebookConfig

    if what.recipe == "paper" and what.selection is not None:
        raise ConfigError(f"--selection {what.selection} and --recipe paper were asked for, which has its own. Leave one out.")
    kind = CodebookConfig.paper if what.recipe == "paper" else CodebookConfig
    changes: dict[str, Any] = {} if what.selection is None else {"selection": what.selection}
    numbers = (_per_site(getattr(what, name), what.sites, name) for name in ("n_codes", "k", "n_groups"))
    return {site: kind(n_codes, k, n_groups or None, **changes) for site, n_codes, k, n_groups in zip(what.sites, *numbers, strict=True)}


def _train(what: RunArguments, config: Any, args: Any) -> dict[str, Any]:
    import torch

    from tl_codebook import attach, load_dataset_from, load_hf
    from tl_codebook.training.data import tokenize_dataset
    from tl_codebook.training.host_trainer import HostTrainer
    from tl_codebook.training.trainer import CodebookTrainer

    configs = {} if what.recipe == "none" else _codebooks(what)
    texts = load_dataset_from(what.dataset)
    held_out = None if what.eval_dataset is None else load_dataset_from(what.eval_dataset)
    model = load_hf(what.model, host=what.host)
    rows = tokenize_dataset(texts, model, context_length=what.context_length)
    if held_out is not None:
        train_rows, eval_rows = rows, tokenize_dataset(held_out, model, context_length=what.context_length)
    elif len(rows) > 1:
        first_held = len(rows) - max(1, len(rows) // 20)
        train_rows, eval_rows = rows.select(range(first_held)), rows.select(range(first_held, len(rows)))
    else:
        raise DataError(f"{what.dataset} fills one row of tokens, so none can be held out. Give --eval_dataset, or more text.")
    trainer: Any
    common = {"train_dataset": train_rows, "eval_dataset": eval_rows}
    if what.recipe == "none":
        trainer = HostTrainer(model, args, **common)
        results: dict[str, Any] = {"base": _figures(trainer.evaluate())}
    else:
        base = HostTrainer(model, args, **common).evaluate()
        attach(model, configs, layers=what.layers)
        trainer = CodebookTrainer(model, args, config=config, **common)
        started = time.perf_counter()
        if not what.resume:
            trainer.start_codes()
        results = {"base": _figures(base), "seconds_to_start_codes": round(time.perf_counter() - started, 1)}
        results["codes_at_start"] = _figures(trainer.evaluate())
    started = time.perf_counter()
    state = trainer.train(resume_from_checkpoint=True if what.resume else None)
    seconds = time.perf_counter() - started
    results["trained"] = _figures(trainer.evaluate())
    lengths = [len(row) for row in train_rows["input_ids"]]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    results |= {
        "recipe": what.recipe,
        "steps": state.global_step,
        "tokens": int(state.global_step * batch * sum(lengths) / len(lengths)),
        "seconds": round(seconds, 1),
        "seed": args.seed,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
    }
    if what.recipe != "none" and args.should_save:
        from tl_codebook import save

        save(trainer.hooked, Path(args.output_dir) / "model", overwrite=True)
    return json.loads(json.dumps(results))


def _figures(metrics: dict[str, Any]) -> dict[str, float]:
    keys = ("loss", "accuracy", "dead_codes", "code_perplexity", "unexplained_variance")
    return {key: round(float(metrics[f"eval_{key}"]), 4) for key in keys if f"eval_{key}" in metrics}


def _table(results: dict[str, Any]) -> str:
    names = {"base": "base, before", "codes_at_start": "with codes, untrained", "trained": "trained"}
    lines = [f"{'held-out text':<24}{'loss (nats)':>12}{'accuracy':>10}{'dead codes':>12}{'perplexity':>12}"]
    for key, name in names.items():
        if key in results:
            row = results[key]
            dead = f"{row['dead_codes']:.1%}" if "dead_codes" in row else "-"
            perplexity = f"{row['code_perplexity']:.0f}" if "code_perplexity" in row else "-"
            lines.append(f"{name:<24}{row['loss']:>12.4f}{row['accuracy']:>10.2%}{dead:>12}{perplexity:>12}")
    lines.append(f"{results['steps']} steps, {results['tokens']:,} tokens, {results['seconds']:.0f} s, recipe {results['recipe']}")
    return "\n".join(lines)
