"""Where the native engine and torch differ, it is by int8 codes at rounding edges: turning those over in torch mends the text."""

import pytest
import torch
from bitnet_arch import kernel_ops, packed, save_master
from bitnet_arch.gguf import export_gguf, from_gguf
from bitnet_arch.testing import ODD_SHAPE, convert_calibrated, softened, tiny_decoder, tiny_tokenizer
from bitnet_kernels import Engine

EXACT = 1e-5  # of the largest logit: what sums of another order come to
EDGE = 1e-4  # of a code's step
MOST_CODES = 2  # that a text of twelve tokens may have on the other side


class Codes:
    """Quantises as training does, records how near each number is to a rounding edge, and turns chosen codes over."""

    def __init__(self):
        self.turned, self.inputs = set(), []

    def __call__(self, x):
        codes, scale = packed_quantize(x)
        exact = x[0] / scale[0]
        for call, token, feature in self.turned:
            if call == len(self.inputs):
                low = exact[token, feature].floor()
                codes[0, token, feature] = (2 * low + 1 - codes[0, token, feature]).to(torch.int8)
        self.inputs.append((x[0], ((exact - exact.floor()) - 0.5).abs()))
        return codes, scale

    def nearest(self, token, count=3):
        """Return groups of places, the nearest to an edge first: several where layers read one input."""
        places = []
        for call, (x, distance) in enumerate(self.inputs):
            for value, feature in zip(*(found.tolist() for found in distance[token].topk(count, largest=False)), strict=True):
                places.append((value, float(x[token, feature]), (call, token, feature)))
        groups = {}
        for value, number, place in sorted(places):
            groups.setdefault((value, number), set()).add(place)
        return list(groups.items())


packed_quantize = packed.quantize_activation


def mend(model, text, wanted, monkeypatch):
    """Return how near to an edge the codes lay that had to be turned over in torch for its logits to be the wanted ones."""
    turned, distances = set(), []

    @torch.no_grad()
    def errors(turned):
        codes = Codes()
        codes.turned = turned
        monkeypatch.setattr(packed, "quantize_activation", codes)
        logits = model(input_ids=text[None]).logits[0]
        return (logits - wanted).abs().amax(-1) / wanted.abs().max(), codes

    while True:
        found, codes = errors(turned)
        if found.max() <= EXACT:
            return distances
        first = int((found > EXACT).nonzero()[0])
        assert len(distances) < MOST_CODES, (
            f"more than {MOST_CODES} codes differ: from token {first} on by {float(found.max()):.2g}"
        )
        for (distance, _), places in codes.nearest(first):
            if distance > EDGE or places <= turned:
                continue
            if errors(turned | places)[0][first] <= EXACT:
                turned, distances = turned | places, [*distances, distance]
                break
        else:
            pytest.fail(f"token {first} differs by {float(found[first]):.2g}, and no code at a rounding edge explains it")


@pytest.mark.parametrize(
    ("variant", "norm", "changes"),
    [
        ("qwen2", "allnorm", {}),
        ("qwen2-sliding", "subln", {}),
        ("gemma3-capped", "allnorm", {"final_logit_softcapping": None}),  # without the cap, that differences keep their size
    ],
    ids=["qwen2", "qwen2-sliding", "gemma3"],
)
def test_what_differs_is_a_code_at_a_rounding_edge(variant, norm, changes, tmp_path, monkeypatch):
    texts = torch.randint(0, 511, (80, 12), generator=torch.Generator().manual_seed(5))
    model = convert_calibrated(tiny_decoder(variant, ODD_SHAPE, **changes), softened(norm, granularity="row"), [texts[:6]])
    save_master(model, tmp_path / "m", tiny_tokenizer(512))
    export_gguf(tmp_path / "m", tmp_path / "model.gguf")
    restored, engine = from_gguf(tmp_path / "model.gguf"), Engine(tmp_path / "model.gguf")
    monkeypatch.setattr(kernel_ops, "_switch", "off")
    found = torch.stack([torch.from_numpy(engine.logits(text.tolist())) for text in texts])
    with torch.no_grad():
        expected = restored(input_ids=texts).logits
    spoiled = ((found - expected).abs().amax(-1) > EXACT * expected.abs().max()).any(-1)
    assert 0 < spoiled.sum() <= len(texts) // 10  # without any, nothing is shown
    for text, wanted in zip(texts[spoiled], found[spoiled], strict=True):
        assert mend(restored, text, wanted, monkeypatch)
    # The control: another model is not mended by codes at edges.
    with torch.no_grad():
        restored.get_submodule("model.layers.0.mlp.down_proj").weight_scale.mul_(1.001)
    with pytest.raises((AssertionError, pytest.fail.Exception), match="differ"):
        mend(restored, texts[0], found[0], monkeypatch)
