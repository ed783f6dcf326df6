"""``tl-codebook tokfsm``: the ground-truth experiment: train a model and its codes on a finite state machine, and check them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Run the experiment, print the table beside the published numbers, force a state, write the report."""
    asked = _parser().parse_args(list(argv))

    from tl_codebook.experiments.tokfsm.experiment import run_experiment
    from tl_codebook.experiments.tokfsm.report import REPORT, write_report
    from tl_codebook.experiments.tokfsm.setting import OPTIONS, TokFSMSetting
    from tl_codebook.experiments.tokfsm.tables import demonstration_text, figure_table
    from tl_codebook.files import as_path

    changes: dict[str, Any] = {name: getattr(asked, name) for name in OPTIONS if getattr(asked, name) is not None}
    setting = TokFSMSetting.preset(asked.preset, **changes)
    name = setting.name if setting.recipe == "default" else f"{setting.name}-{setting.recipe}"
    folder = as_path(asked.output_dir or f"runs/tokfsm-{name}-seed{asked.seed}")
    results = run_experiment(setting, folder, seed=asked.seed, host=asked.host, resume=asked.resume, progress=not asked.quiet)
    write_report(results, folder / REPORT)
    print(figure_table(results))
    print()
    print(demonstration_text(results))
    print(f"\nmodel: {folder / 'model'}, load it with tl_codebook.load({str(folder / 'model')!r})\nreport: {folder / REPORT}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tl-codebook tokfsm", description=__doc__)
    add = parser.add_argument
    add("--preset", default="mini", help="mini (20 states, 2 layers; minutes) or paper (100 states, 4 layers; hours on a CPU).")
    add("--seed", type=int, default=0, help="Seed of weights, data and sampled text.")
    add("--recipe", help="default (base first, then codes from its activations) or paper (both from scratch, as Tamkin et al. 2023).")
    add("--architecture", help="gpt2 (learned positions; the preset paper) or gpt_neox (rotary positions; mini, and Tamkin et al. 2023).")
    add("--output_dir", help="New folder for checkpoints, figures and report; runs/tokfsm-... by default.")
    add("--resume", action="store_true", help="Go on with the run in the folder where it stopped.")
    add("--host", choices=["hooked", "bridge"], help="HookedTransformer where TransformerLens has it, by default.")
    add("--base_steps", type=int, help="Steps without codebooks; by default those of the preset.")
    add("--code_steps", type=int, help="Steps with codebooks; by default those of the preset.")
    add("--batch_size", type=int, help="Rows of a step; by default those of the preset.")
    compiled = "Train under torch.compile, which needs a C++ compiler on a CPU; by default the preset paper does."
    add("--compiled", action=argparse.BooleanOptionalAction, help=compiled)
    add("--quiet", action="store_true", help="No progress bars.")
    return parser
