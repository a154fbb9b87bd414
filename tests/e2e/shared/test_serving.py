"""A checkpoint, packed as a user packs it, behind the real TorchServe."""

from pathlib import Path

import pytest
import requests

from tests.e2e.asking import PROMPT, describe, predict
from tests.e2e.shared.conftest import OFFLOADED_SETTINGS, SAMPLE_SETTINGS, SETTINGS

ROOT = Path(__file__).parents[3]

PROMPTS = [PROMPT, "The quick brown fox jumps over the lazy dog, again", "東京"]


@pytest.mark.parametrize(
    "name, folder, settings, tiers",
    [
        ("continuous", "bloom", SETTINGS, {"cpu"}),
        ("plain", "bloom", SETTINGS, {"cpu"}),
        ("offloaded", "bloom", OFFLOADED_SETTINGS, {"cpu", "disk"}),
        ("sample", "other_bloom", SAMPLE_SETTINGS, {"cpu"}),
    ],
)
def test_the_text_is_what_generate_gives(request, generated, name, folder, settings, tiers):
    server, folder = request.getfixturevalue(name), request.getfixturevalue(folder)
    expected = [generated(prompt, folder=folder, settings=settings) for prompt in PROMPTS]
    assert predict(server.url, *PROMPTS).json() == {"predictions": expected}
    assert predict(server.url, {"data": PROMPTS[0]}).json() == {"predictions": expected[:1]}
    text = requests.post(f"{server.url}/predictions/bloom", data=PROMPTS[0].encode(), timeout=120)
    assert text.text == expected[0]
    assert describe(server.url)["tiers"].keys() == tiers


def test_two_at_once_share_nothing(continuous, sample, generated, other_bloom):
    answers = [predict(server.url, PROMPT, max_new_tokens=20).json() for server in (continuous, sample)]
    one, two = generated(new_tokens=20), generated(new_tokens=20, folder=other_bloom, settings=SAMPLE_SETTINGS)
    assert one != two
    assert answers == [{"predictions": [one]}, {"predictions": [two]}]


def test_a_zip_is_unpacked_once(continuous, bloom_zip):
    unpacked = [path for path in (continuous.work / "tmp/models").rglob("*") if path.is_file()]
    assert not any(path.name == "model.zip" for path in unpacked)
    # The served weights and the code beside them, and not a second copy of either.
    size, code = bloom_zip.stat().st_size, sum(path.stat().st_size for path in (ROOT / "handler").rglob("*.py"))
    assert size < sum(path.stat().st_size for path in unpacked) < size + code + min(size, code) // 2


def test_no_archive_copies_nothing(plain):
    assert not any(path.is_file() and path.stat().st_size > 1000 for path in (plain.work / "tmp").rglob("*"))


def test_a_work_folder_too_deep_for_a_socket(offloaded):
    assert len(str(offloaded.work)) > 107
    assert Path((offloaded.work / "short").read_text()).is_dir()
