"""`OriginalConfig` against the original's configuration: what it makes of arguments, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tl_codebook.convert.original_config import PLACES, OriginalConfig
from tl_codebook.errors import ConfigError

N_LAYERS, N_HEADS = 2, 4


def test_every_case(shared):
    cases = json.loads(shared("golden/config/codebook_model_config/case.json").read_text())["cases"]
    assert len(cases) > 15
    for case in cases:
        if "error" in case:
            with pytest.raises(ConfigError):
                OriginalConfig.from_dict(case["kwargs"])
            continue
        config = OriginalConfig.from_dict(case["kwargs"])
        own = dataclasses.asdict(config) | {"replace_codes": config.replace_codes, "model_type": "codebook"}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        assert plain == case["config"], case["kwargs"]
        on_model = case["on_gpt2_2layers_4heads_d32"]
        assert list(config.groups(N_HEADS)) == on_model["num_codebooks"]
        assert list(config.layers(N_LAYERS)) == on_model["layers_to_snap"]
        keys = [
            f"layer{layer}_{place}" + (f"_gcb{group}" if kind == "group" else "")
            for layer in config.layers(N_LAYERS)
            for place, kind, n_groups in zip(config.codebook_at, config.codebook_type, config.groups(N_HEADS), strict=True)
            if place in PLACES
            for group in range(n_groups)
        ]
        assert keys == on_model["keys"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"codebook_at": []}, "names no place"),
        ({"codebook_at": 3}, "names no place"),
        ({"codebook_at": ["attn", "mlp"], "k_codebook": [1]}, "1 values for 2 places"),
        ({"k_codebook": True}, "holds True"),
        ({"num_codebooks": 4}, "vanilla codebook, which is one"),
        ({"codebook_type": "group", "num_codebooks": 0}, "num_codebooks=0"),
        ({"loss": "vq"}, "'vq' is not known"),
        ({"loss": 3}, "loss=3 is a int"),
        ({"layers_to_snap": [0.5]}, "names no layers"),
        ({"codebook_kwargs": [1]}, "codebook_kwargs="),
        ({"codebook_kwargs": {"snap": False}}, "do not snap"),
    ],
)
def test_refused(given, text):
    with pytest.raises(ConfigError, match=text):
        OriginalConfig.from_dict(given)


def test_layers_that_the_base_does_not_have():
    with pytest.raises(ConfigError, match="layer 2, the base model has 2 layers"):
        OriginalConfig.from_dict({"layers_to_snap": [0, 2]}).layers(N_LAYERS)


def test_what_hugging_face_writes_beside_it_is_left_alone():
    config = OriginalConfig.from_dict({"torch_dtype": "float32", "architectures": ["GPT2CodebookModel"], "codebook_at": "attn"})
    assert config == OriginalConfig(codebook_at=("attn",))
