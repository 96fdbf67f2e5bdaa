import re
import tomllib
from importlib import resources

import pytest

from glasklar.errors import RecipeError
from glasklar.model.config import ModelConfig
from glasklar.model.shapes import hardware_names, load_hardware, load_shape, shape_names

SHAPES = {
    "deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "deepseek-r1", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b",
    "qwen2.5-72b", "r1-distill-qwen-1.5b", "gpt-oss-20b",
}  # fmt: skip
DEVICES = {"cpu-2-cores", "cpu-desktop", "rtx-4090", "a100", "h100", "h800", "h200"}


@pytest.mark.parametrize("name", shape_names())
def test_shape_files_hold_fields_of_the_configuration_and_a_source(name):
    text = (resources.files("glasklar") / "recipes" / "shapes" / f"{name}.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text).keys() <= {"source", *ModelConfig.model_fields}
    assert len(load_shape(name).source) > 20


def test_names():
    assert set(shape_names()) == SHAPES
    assert set(hardware_names()) == DEVICES


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_devices_are_complete_and_plausible(name):
    device = load_hardware(name)
    assert device.name == name
    # FLOPs per byte of memory traffic: CPUs about 10, GPUs 100 to 300; a slip of a power of ten falls out.
    assert 5 < device.flops / device.bandwidth < 400


def test_r1_has_v3s_shape():
    assert load_shape("deepseek-r1").config == load_shape("deepseek-v3").config


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (load_shape, "deepsek-v3", "no shape 'deepsek-v3'; did you mean 'deepseek-v3'?"),
        (load_shape, "r1", "no shape 'r1'; did you mean 'deepseek-r1' or 'r1-distill-qwen-1.5b'?"),
        (load_shape, "", "no shape ''; there are deepseek-r1"),
        (load_shape, "../hardware", "no shape '../hardware'; there are deepseek-r1"),
        (load_hardware, "h8000", "no hardware 'h8000'; did you mean 'h800'?"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(load, name, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load(name)
