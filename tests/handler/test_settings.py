import json

import pytest

from handler.errors import SettingsError
from handler.settings import Settings, parse_size, read_settings
from tests.models import SAMPLE_SETUP_CONFIG


@pytest.fixture
def read(tmp_path):
    def read(values):
        path = tmp_path / "setup_config.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return read_settings(path)

    return read


def test_the_sample_is_read_as_the_sample_meant_it(read):
    settings = read(SAMPLE_SETUP_CONFIG)
    assert settings.max_memory == {0: 10 * 10**9, "cpu": 10 * 10**9}
    assert settings.dtype == "float16"
    assert settings.max_new_tokens == 80
    assert settings.offload_folder == "offload"


def test_no_file_means_defaults(tmp_path):
    assert read_settings(tmp_path / "setup_config.json") == Settings()


@pytest.mark.parametrize(
    "size, expected",
    [
        ("10GB", 10**10),
        ("10 GiB", 10 * 2**30),
        ("512MiB", 2**29),
        (1000, 1000),
        ("1.5KB", 1500),
        ("7", 7),
        ("2Gi", 2**31),
    ],
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize(
    "device_map", ["auto", "balanced", "balanced_low_0", "sequential", {"transformer": 0, "lm_head": "cpu"}]
)
def test_device_maps(read, device_map):
    assert read({"device_map": device_map}).device_map == device_map


def test_true_means_auto_as_the_samples_text_has_it(read):
    assert read({"device_map": True}).device_map == "auto"


def test_both_names_of_a_key(read):
    assert read({"dtype": "bfloat16"}) == read({"torch_dtype": "bfloat16"})
    assert read({"max_length": "80", "max_new_tokens": 20}).max_new_tokens == 20
    with pytest.raises(SettingsError, match=r"float16.*float32"):
        read({"dtype": "float16", "torch_dtype": "float32"})


@pytest.mark.parametrize(
    "values, key, value, allowed",
    [
        ({"max_memry": {"cpu": "1GB"}}, "max_memry", "1GB", "max_memory"),
        ({"max_memory": {"cpu": "10gb"}}, "max_memory.cpu", "10gb", "GiB"),
        ({"max_memory": {"cpu": "lots"}}, "max_memory.cpu", "lots", "GB"),
        ({"max_memory": {"gpu": "1GB"}}, "max_memory.gpu", "gpu", "GPU index"),
        ({"max_memory": "10GB"}, "max_memory", "10GB", "dictionary"),
        ({"torch_dtype": "float8"}, "torch_dtype", "float8", "bfloat16"),
        ({"device_map": "automatic"}, "device_map", "automatic", "sequential"),
        ({"device_map": {"transformer": "gpu"}}, "device_map", "gpu", "GPU index"),
        ({"max_length": "eighty"}, "max_length", "eighty", "integer"),
        ({"max_new_tokens": 0}, "max_new_tokens", "0", "greater than 0"),
        ({"max_batch_size": -1}, "max_batch_size", "-1", "greater than 0"),
        ({"generation": {"temprature": 1}}, "generation", "temprature", "GenerationConfig"),
        ({"generation": {"num_beams": 4}}, "generation", "num_beams", "cannot be honoured"),
        ({"generation": {"temperature": -1}}, "generation", "temperature", "0 or more"),
        ({"trust_remote_code": "maybe"}, "trust_remote_code", "maybe", "boolean"),
    ],
)
def test_a_bad_value_is_one_line_with_key_value_and_what_is_allowed(read, values, key, value, allowed):
    with pytest.raises(SettingsError) as error:
        read(values)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in ("setup_config.json", key, value, allowed)), message


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_file_that_is_no_json_object(read, text):
    with pytest.raises(SettingsError, match=r"setup_config\.json"):
        read(text)


def test_a_temperature_alone_asks_for_sampling_as_it_does_in_a_request(read):
    assert read({"generation": {"temperature": 0.7, "seed": 3}}).generation == {"temperature": 0.7, "seed": 3}


def test_every_key_is_described():
    assert all(field.description for field in Settings.model_fields.values())
