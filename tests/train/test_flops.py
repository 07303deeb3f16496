"""The useful arithmetic of a step: by hand, and against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.models import small_classifiers
from train import model
from train.model import flops


def masked_lm(name: str) -> model.PackedMaskedLM:
    with torch.device("meta"):
        return model.build_masked_lm(model.named_config(name, 30522, 0), 0)


def test_bert_base_by_hand():
    # 12 layers of 12 x 768^2 weights and 2 x 128 x 768 of attention; the head 768^2 + 768 x 30522.
    counted = flops.count_flops(masked_lm("bert-base"), 128)
    assert counted.per_token == 6 * 12 * (12 * 768**2 + 2 * 128 * 768)
    assert counted.per_masked_token == 6 * (768**2 + 768 * 30522)
    assert counted.of(1, 0.15) == pytest.approx(545.4e6, rel=1e-3)


def test_agrees_with_pytorchs_count_of_a_whole_step():
    torch.manual_seed(0)
    config = model.named_config("bert-tiny", 500, 0)
    module = model.build_masked_lm(config, 0)
    module.last_layer_subset = False
    module.head_implementation = "reference"
    rows, slots, masked = 2, 64, 20
    places = torch.arange(slots).expand(rows, slots)
    with FlopCounterMode(display=False) as counter:
        loss, _ = module(
            torch.randint(5, 500, (rows, slots)), places, torch.zeros_like(places),
            torch.arange(masked), torch.randint(5, 500, (masked,)),
        )
        loss.backward()
    ours = flops.count_flops(module, slots).of(rows * slots, masked)
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize("name", small_classifiers())
def test_reading_texts_agrees_with_pytorchs_count(name):
    """Of texts of two lengths, one after the other; the head is beyond what is counted."""
    torch.manual_seed(0)
    kind, config = small_classifiers()[name]
    config._attn_implementation = "eager"  # the counter knows no fused attention on a CPU
    encoder = kind(config).eval()
    lengths = (64, 17)
    with FlopCounterMode(display=False) as counter:
        for length in lengths:
            encoder.base_model(torch.randint(5, 40, (1, length)))
    ours = flops.forward_flops(encoder, sum(lengths), sum(length**2 for length in lengths))
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.02)
    both = flops.forward_flops(torch.nn.ModuleList([encoder, encoder]), 81, 64**2 + 17**2)
    assert both == 2 * ours


def test_an_unknown_family_is_not_counted():
    assert flops.forward_flops(torch.nn.Linear(2, 2), 1, 1) is None


def test_peak_of_a_cpu_is_measured():
    peak = flops.peak_flops(torch.device("cpu"), "fp32")
    assert peak.flops_per_second > 1e8
    assert "1024" in peak.source


@pytest.mark.parametrize(
    ("name", "rate"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4", 312e12)],
)
def test_peak_of_a_known_gpu_is_its_data_sheets(monkeypatch, name, rate):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak_flops(torch.device("cuda"), "bf16").flops_per_second == rate


def test_memory_by_hand():
    """4 bytes for weights and gradients, and 16 for states that two ranks share."""
    line = flops.memory_line(
        masked_lm("bert-base"), stage=1, world_size=2, precision="fp16",
        micro_batch_slots=256 * 128, mask_rate=0.15, gradient_checkpointing=False,
    )
    assert "states 1.22 GiB" in line  # 109,514,298 x 12
    assert "activations 10.12 GiB" in line  # 32,768 x 768 x 18 x 12 layers x 2 bytes
    assert "logits 0.28 GiB" in line  # 0.15 x 32,768 x 30,522 x 2 bytes
