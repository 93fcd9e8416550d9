"""Calibration state saved with checkpoints."""

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models import building, state
from hyclora.models.patch import find_patch
from hyclora.models.state import FILE_NAME, load_calibration, save_calibration
from tests.helpers.small_models import gradients, llama, padded_batch


def calibrated(num_hidden_layers=2, **config):
    model = llama(num_hidden_layers=num_hidden_layers)
    apply_hyclora(model, HycloraConfig(iteration_threshold=2, **config))
    for seed in range(2):
        gradients(model, padded_batch(seed=seed))
    return model


def test_resumed_gradients_are_bit_equal(tmp_path):
    """Defect of the original: calibration lost on resume."""
    model = calibrated(q_bit=2)
    save_calibration(model, tmp_path)
    expected = gradients(model, padded_batch(seed=9))[1]
    resumed = llama()
    apply_hyclora(resumed, HycloraConfig(iteration_threshold=2, q_bit=2))
    load_calibration(resumed, tmp_path)
    assert find_patch(resumed).step.index == 2
    ours = gradients(resumed, padded_batch(seed=9))[1]
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_missing_or_foreign_state_is_refused(tmp_path):
    model = calibrated()
    with pytest.raises(ValueError, match=FILE_NAME):
        load_calibration(model, tmp_path)
    save_calibration(model, tmp_path)
    other = llama()
    apply_hyclora(other, HycloraConfig(q_bit=8))
    with pytest.raises(ValueError, match="other settings of q_bit, iteration_threshold"):
        load_calibration(other, tmp_path)


def swap(folder):
    save_file({"w": torch.zeros(3)}, folder / FILE_NAME)


def cut(folder):
    file = folder / FILE_NAME
    file.write_bytes(file.read_bytes()[:-20])


def no_config(folder):
    save_file({"w": torch.zeros(3)}, folder / FILE_NAME, {"format": "2"})


def flip(folder, where: bytes, offset=0):
    """Another bit in the file, behind the first place of some bytes."""
    content = bytearray((folder / FILE_NAME).read_bytes())
    content[content.index(where) + offset] ^= 1
    (folder / FILE_NAME).write_bytes(content)


def one_bit_of_a_statistic(folder):
    flip(folder, b"}}", offset=5000)


def one_bit_of_a_name(folder):
    flip(folder, b"total_square")


def one_bit_of_a_number(folder):
    flip(folder, rb"\"begun\": 0", offset=11)


DAMAGES = [cut, swap, no_config, one_bit_of_a_statistic, one_bit_of_a_name, one_bit_of_a_number]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_torn_file_is_refused_and_changes_nothing(tmp_path, damage):
    model = calibrated()
    save_calibration(model, tmp_path)
    expected = gradients(model, padded_batch(seed=9))[1]
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"{FILE_NAME} is torn, or no calibration of HyC-LoRA: resume from another"):
        load_calibration(model, tmp_path)
    found = gradients(model, padded_batch(seed=9))[1]
    assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_statistics_that_are_not_finite_are_refused_and_change_nothing(tmp_path):
    """Every step would have gradients that are not; widths of the gauge have a nan where no token was."""
    broken, model = calibrated(), calibrated()
    expected = gradients(model, padded_batch(seed=9))[1]
    find_patch(broken).blocks[1].savers["q"].statistics["total_square"][3] = torch.nan
    save_calibration(broken, tmp_path)
    with pytest.raises(
        ValueError, match=r"has statistics of .*layers\.0\.self_attn\.q that are not finite.* an earlier"
    ):
        load_calibration(model, tmp_path)
    found = gradients(model, padded_batch(seed=9))[1]
    assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_another_models_calibration_is_refused(tmp_path):
    save_calibration(calibrated(num_hidden_layers=3), tmp_path)
    with pytest.raises(ValueError, match=r"is of another model, this one has no .*layers\.2"):
        load_calibration(calibrated(), tmp_path)


def test_it_is_told_where_a_run_goes_on_with_slots_kept_otherwise(tmp_path, monkeypatch, caplog):
    """As the same settings kept them before: q_bit=2 had groups of 64 and a k of 2 bit."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 512}
    model, again = llama(**sizes), llama(**sizes)
    with monkeypatch.context() as before:
        before.setattr(building, "WIDER", {})
        apply_hyclora(model, HycloraConfig(q_bit=2))
    apply_hyclora(again, HycloraConfig(q_bit=2))
    save_calibration(model, tmp_path / "before")
    save_calibration(again, tmp_path / "now")
    load_calibration(again, tmp_path / "now")
    assert not caplog.records
    load_calibration(again, tmp_path / "before")
    assert "gate, k, up were kept otherwise" in caplog.records.pop().getMessage()
    with safe_open(tmp_path / "before" / FILE_NAME, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    del metadata["kept"], metadata["digest"]  # as versions wrote it that had no larger groups
    save_file(tensors, tmp_path / "before" / FILE_NAME, metadata)
    load_calibration(again, tmp_path / "before")
    assert "gate, up were kept otherwise" in caplog.records.pop().getMessage()


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    model = calibrated()
    file = save_calibration(model, tmp_path)
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(SafetensorError):
        save_calibration(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME] and file.read_bytes() == before


def test_an_uncalibrated_model_saves_and_loads(tmp_path):
    """A checkpoint before the first step is a valid one."""
    first, second = llama(), llama()
    apply_hyclora(first)
    apply_hyclora(second)
    save_calibration(first, tmp_path)
    load_calibration(second, tmp_path)
    gradients(second, padded_batch())
    assert find_patch(second).step.index == 1


def test_calibration_does_not_depend_on_where_slots_wait(tmp_path):
    """A run may go on with offload=True, or from a file that was written before there was such an option."""
    model = calibrated()
    save_calibration(model, tmp_path)
    find_patch(model).config.offload = True
    load_calibration(model, tmp_path)
