"""Results of a TokFSM run made up by hand, every figure another one, so that a swap would show."""

import copy

from tl_codebook.experiments.tokfsm.setting import TokFSMSetting


def scores(precision, recall, covered=1.0):
    return {"precision": precision, "recall": recall, "covered": covered}


def forced(machine, model, share=None):
    return {
        "jsd_machine": machine / 10,
        "normalised_machine": machine,
        "jsd_model": model / 10,
        "normalised_model": model,
        "successor_share": share,
        "successor_exact": None,
        "n_rows": 30,
    }


def used(*pairs):
    return {
        "used": [pair[0] for pair in pairs],
        "attainable": [pair[1] for pair in pairs],
        "dead": [1 - pair[0] / pair[1] for pair in pairs],
        "perplexity": [pair[0] / 2 for pair in pairs],
    }


def pure(bigram, trigram):
    return {
        word: {"codes": value, "inputs": value, "n_codes": 9, "n_inputs": 12} for word, value in (("bigram", bigram), ("trigram", trigram))
    }


def of_model(loss):
    return {
        "loss": loss,
        "accuracy": loss / 2,
        "bayes_loss": 1.0,
        "bayes_accuracy": 0.6,
        "excess": loss - 1,
        "held_out_rows": 40,
        "valid_transitions": loss / 3,
        "first_valid": 0.5,
        "n_transitions": 100,
        "n_sequences": 10,
        "first_successors": 0.9,
        "first_successors_exact": loss / 4,
    }


def plain(value):
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def made_results(setting=None):
    """Return results as `run_experiment` gives them; by default of the preset mini."""
    setting = TokFSMSetting.mini() if setting is None else setting
    one_site = {}
    for layer in range(setting.n_layers):
        one_site |= {f"L{layer}.z": forced(0.9 - 0.1 * layer, 0.8), f"L{layer}.mlp_out": forced(0.7 - 0.1 * layer, 0.5)}
    mlp = [f"L{layer}.mlp_out" for layer in range(setting.n_layers)]
    n = setting.n_states
    codes = of_model(1.2) | {
        "dead": {"share": 0.25, "used": 75, "attainable": 100, "sites": {"L0.z": used((30, 40), (10, 20)), "L0.mlp_out": used((35, 40))}},
        "state_codes": {
            "recall > 1 %": scores(0.91, 0.31),
            "recall >= 95 %": scores(0.92, 0.96, 0.97),
            "controls": {
                "best neuron, recall > 1 %": scores(0.61, 0.31),
                "best neuron, recall >= 95 %": scores(0.62, 0.96),
                "TopK dictionary, recall > 1 %": scores(0.71, 0.31),
                "TopK dictionary, recall >= 95 %": scores(0.72, 0.96),
                "neurons": 640,
            },
        },
        "best_site": mlp[-1],
        "decode": {name: {"accuracy": 0.8 + 0.01 * layer, "codes_per_state": 1.5 + layer} for layer, name in enumerate(mlp)},
        "purity": {name: pure(0.2 * layer, 0.1 * layer) for layer, name in enumerate(mlp)},
        "automaton": {"precision": 0.55, "recall": 0.45, "f1": 0.495, "min_share": 0.02, "site": "L1.mlp_out"},
        "forcing": {
            "none": forced(1.0, 1.0),
            **one_site,
            "all MLP": forced(0.125, 0.0625, 0.875),
            "all MLP, wrong": forced(1.3, 1.2),
            "all MLP, random": forced(2.5, 1.9),
            "all attention": forced(0.55, 0.45),
            "all": forced(0.03, 0.02, 0.99),
        },
        "demonstration": {
            "state": 0,
            "forced": 1,
            "codes": {name: [layer + 5, 3][: setting.k] for layer, name in enumerate(mlp)},
            "before": [0.5, 0.25, 0.25] + [0.0] * (n - 3),
            "after": [0.125, 0.125, 0.0, 0.75] + [0.0] * (n - 4),
            "successors_of_state": [0, 1],
            "successors_of_forced": [2, 3],
        },
    }
    results = {
        "setting": plain(setting.to_dict()),
        "seed": 7,
        "host": None,
        "stages": {stage: {"steps": 10, "tokens": 1000 * (i + 1), "seconds": 30.0} for i, stage in enumerate(setting.steps)},
        "tokens": 4321,
        "base": of_model(1.1),
        "codes": codes,
        "where": {
            "device": "cpu",
            "cpu": "A Processor",
            "cores": 2,
            "threads": 1,
            "python": "3.11.7",
            "torch": "2.6.0",
            "commit": "abc1234",
        },
    }
    if "base" not in setting.steps:
        del results["base"]
    return copy.deepcopy(results)
