"""Promise: with integrations.transformers, every model computes what its eager attention computes.

Models are of every architecture of transformers that lets its attention be replaced, each with a
tiny configuration and random parameters. Results are compared at tokens that are not padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is missing")
if not (5, 10) <= tuple(map(int, transformers.__version__.split(".")[:2])) < (6, 0):
    pytest.skip(
        f"transformers is {transformers.__version__}, not 5.10 to 5.x", allow_module_level=True
    )

from transformers import masking_utils  # noqa: E402

import masked_softmax_ext.integrations.transformers as integration  # noqa: E402
from masked_softmax_ext import mask_from_lengths  # noqa: E402

NAME = integration.register()
# Of the largest value. Sums in a different order differ by about 1e-6, in Gemma 4, which does not
# scale its scores, by 1e-5.
TOLERANCE = 3e-5
COLS = 9

# Values for those of these options that a configuration has.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("global_head_dim", "query_pre_attn_scalar", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "num_key_value_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"), 0.0),
    **dict.fromkeys(("attention_dropout", "activation_dropout", "hidden_dropout"), 0.0),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate"), 0.0),
    **dict.fromkeys(("num_kv_shared_layers", "pad_token_id", "decoder_start_token_id"), 0),
    "eos_token_id": None,
    "hidden_size_per_layer_input": 8,
    "initializer_range": 0.2,  # attention is far from uniform
    "sliding_window": 4,
    "attention_chunk_size": 5,
}

Options = dict[str, Any]


def each(model_types: str, **options: Any) -> dict[str, Options]:
    return dict.fromkeys(model_types.split(), options)


LATENT = {"num_key_value_heads": 4}  # multi-head latent attention: no head shares its keys

DECODERS: dict[str, Options] = {
    **each("""
        afmoe apertus arcee aria_text bart bert bert-generation bigbird_pegasus biogpt bitnet
        blenderbot blenderbot-small camembert codegen cohere cohere2 ctrl cwm data2vec-text
        diffllama electra ernie ernie4_5 ernie4_5_moe exaone4 flex_olmo gemma gemma2 gemma3_text
        gemma3n_text gemma4_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite
        granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe jetmoe laguna lfm2 llama
        llama4_text marian mbart mimo_v2_flash minimax minimax_m2 ministral ministral3 mistral
        mixtral modernbert-decoder moshi nanochat nemotron olmo olmo2 olmo3 olmoe opt pegasus
        persimmon phi phi3 phimoe plbart qwen2 qwen2_moe qwen3 qwen3_moe roberta
        roberta-prelayernorm seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma whisper
        xlm-roberta xlm-roberta-xl
    """),
    **each("deepseek_v2 deepseek_v3 glm4_moe_lite longcat_flash minicpm3 youtu", **LATENT),
    # Their other layers are linear attention or state spaces.
    **each(
        "olmo_hybrid qwen3_next qwen3_5_text qwen3_5_moe_text",
        layer_types=["linear_attention", "full_attention"],
    ),
    **each("bamba", mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, attn_layer_indices=[1]),
    **each("jamba", attn_layer_period=2, attn_layer_offset=1),
}

# Their own backward pass is NaN for a zero vector: at padding tokens, and, as with sdpa attention,
# at a query without valid keys.
NAN_AT_ZERO = ("gemma3n_text",)

ENCODERS: dict[str, Options] = {
    **each("""
        albert bert camembert data2vec-text distilbert electra ernie esm eurobert gte
        jina_embeddings_v3 layoutlm modernbert nomic_bert roberta roberta-prelayernorm ultrabert
        xlm-roberta xlm-roberta-xl
    """),
    **each("esmc", **LATENT),
    **each("xmod", default_language="en_XX"),
}

ENCODER_DECODERS = each("""
    bart blenderbot blenderbot-small longt5 m2m_100 marian mbart mt5 nllb-moe pegasus pegasus_x
    plbart seamless_m4t seamless_m4t_v2 switch_transformers t5 umt5
""")

IMAGE_ENCODERS = each("beit clip_vision_model deit dinov2 ijepa siglip_vision_model vit")

AUDIO_ENCODERS = each("data2vec-audio hubert unispeech wav2vec2")


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    set_threads(1)


@pytest.fixture
def softmax_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The lengths of every call of this package's softmax."""
    calls: list[Tensor] = []
    right = integration.masked_softmax_

    def recording(scores: Tensor, lengths: Any, **options: Any) -> Tensor:
        calls.append(lengths)
        return right(scores, lengths, **options)

    monkeypatch.setattr(integration, "masked_softmax_", recording)
    return calls


def make_model(auto: str, model_type: str, **options: Any) -> Any:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    kind = transformers.CONFIG_MAPPING[model_type]
    default = kind()
    sizes = {}
    for name, value in SIZES.items():
        try:
            given = getattr(default, name)
        except Exception:  # not an option of this configuration, or one for each layer
            continue
        if name != "sliding_window" or given is not None:
            sizes[name] = value
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(kind(**{**sizes, **options})).eval()
    if not model._can_set_attn_implementation():
        pytest.skip(
            f"in transformers {transformers.__version__}, {model_type} has its own attention"
        )
    return model


def tokens_and_mask(side: str) -> tuple[Tensor, Tensor]:
    """Three texts of 9, 5 and 7 tokens; both ``(3, 9)``."""
    lengths = torch.tensor([COLS, 5, 7])
    starts = COLS - lengths if side == "left" else None
    mask = mask_from_lengths(lengths, COLS, starts)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 60, mask.shape, generator=generator) * mask, mask.long()


Results = dict[str, Tensor]


def train(model: Any, implementation: str, valid: Tensor | None = None, **inputs: Any) -> Results:
    """The output of valid tokens, and the gradients of all parameters."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    torch.manual_seed(2)
    output = model(**inputs)
    output = output.logits if hasattr(output, "logits") else output[0]
    output = output if valid is None else output[valid]
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    # Experts that no token chose have no gradient.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    gradients = torch.cat([gradient.flatten() for gradient in gradients])
    return {"output": output.detach(), "gradients": gradients}


def generate(model: Any, implementation: str, side: str = "left", **options: Any) -> Results:
    """Logits and tokens of greedy decoding with a cache, over the window's size."""
    model.set_attn_implementation(implementation)
    tokens, mask = tokens_and_mask(side)
    options.update(max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, bos_token_id=1)
    result = model.generate(tokens, attention_mask=mask, output_logits=True, **options)
    return {"logits": torch.stack(result.logits), "tokens": result.sequences}


def assert_same(got: Results, expected: Results) -> None:
    assert got.keys() == expected.keys()
    for name, right in expected.items():
        assert got[name].shape == right.shape
        largest = right.abs().max()
        assert largest > 0
        assert bool(((got[name] - right).abs() <= TOLERANCE * largest).all()), name


def assert_like_eager(run: Callable[..., Results], model: Any, *args: Any, **options: Any) -> None:
    expected = run(model, "eager", *args, **options)  # a failure of eager attention is one too
    assert_same(run(model, NAME, *args, **options), expected)


def assert_trains_like_eager(model: Any, valid: Tensor | None = None, **inputs: Any) -> None:
    assert_like_eager(train, model, valid, **inputs)


def assert_generates_like_eager(model: Any, **options: Any) -> None:
    assert_like_eager(generate, model, **options)


# Every architecture: forward, backward and decoding


@pytest.mark.parametrize("model_type", DECODERS)
def test_decoder(model_type: str, softmax_calls: list[Tensor]) -> None:
    """Padding on both sides, sliding windows and chunks, dynamic and static caches."""
    model = make_model("AutoModelForCausalLM", model_type, **DECODERS[model_type])
    for side in ("right", "left"):
        tokens, mask = tokens_and_mask(side)
        if model_type in NAN_AT_ZERO:
            tokens, mask = tokens.clamp(min=1), torch.ones_like(mask)
        assert_trains_like_eager(model, mask.bool(), input_ids=tokens, attention_mask=mask)
    for cache in ("dynamic", "static"):
        assert_generates_like_eager(model, cache_implementation=cache)
    assert len(softmax_calls) > 10


@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoder(model_type: str, softmax_calls: list[Tensor]) -> None:
    model = make_model("AutoModelForMaskedLM", model_type, **ENCODERS[model_type])
    for side in ("right", "left"):
        tokens, mask = tokens_and_mask(side)
        assert_trains_like_eager(model, mask.bool(), input_ids=tokens, attention_mask=mask)
    assert len(softmax_calls) > 1


@pytest.mark.parametrize("model_type", ENCODER_DECODERS)
def test_encoder_decoder(model_type: str, softmax_calls: list[Tensor]) -> None:
    """Cross attention to padded keys."""
    model = make_model("AutoModelForSeq2SeqLM", model_type)
    for side in ("right", "left"):
        tokens, mask = tokens_and_mask(side)
        inputs = {"attention_mask": mask, "decoder_input_ids": tokens_and_mask("right")[0][:, :4]}
        assert_trains_like_eager(model, input_ids=tokens, **inputs)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 1
    for cache in ("dynamic", "static"):
        assert_generates_like_eager(model, side="right", cache_implementation=cache)
    assert len(softmax_calls) > 10


@pytest.mark.parametrize("model_type", IMAGE_ENCODERS)
def test_image_encoder(model_type: str, softmax_calls: list[Tensor]) -> None:
    """Without a mask."""
    model = make_model("AutoModel", model_type, image_size=32, patch_size=8)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    assert_trains_like_eager(model, pixel_values=images)
    assert softmax_calls


@pytest.mark.parametrize("model_type", AUDIO_ENCODERS)
def test_audio_encoder(model_type: str, softmax_calls: list[Tensor]) -> None:
    """The model makes its mask from the number of samples."""
    layers = {"conv_dim": (32,) * 3, "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2)}
    options = {"num_feat_extract_layers": 3, "apply_spec_augment": False}
    model = make_model("AutoModel", model_type, **layers, **options, num_conv_pos_embeddings=8)
    sound = torch.randn(2, 800, generator=torch.Generator().manual_seed(3))
    mask = mask_from_lengths(torch.tensor([800, 500]), 800).long()
    frames = model._get_feat_extract_output_lengths(mask.sum(-1))
    valid = mask_from_lengths(frames, int(frames.max()))
    assert_trains_like_eager(model, valid, input_values=sound * mask, attention_mask=mask)
    assert softmax_calls


# The mask function

WINDOWS: dict[str, Callable[..., Any]] = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "window, bidirectional": masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 2, 1])),
    "packed": masking_utils.and_masks(
        masking_utils.causal_mask_function,
        masking_utils.packed_sequence_mask_function(torch.tensor([0] * 4 + [1] * 12).expand(3, -1)),
    ),
}


@pytest.mark.parametrize("padding", [None, "left", "right", "both"])
@pytest.mark.parametrize("function", WINDOWS.values(), ids=list(WINDOWS))
def test_bounds_are_those_of_the_mask(function: Callable[..., Any], padding: str | None) -> None:
    """Of the mask that sdpa attention gets, with and without cached keys, and in a static cache."""
    lengths = torch.tensor([12, 7, 9])
    starts = {"right": 0 * lengths, "left": 12 - lengths}.get(str(padding), torch.tensor([0, 2, 1]))
    mask = None if padding is None else mask_from_lengths(lengths, 12, starts)
    for queries, keys, first_query, first_key in (
        (12, 12, 0, 0),
        (1, 12, 11, 0),
        (4, 12, 8, 0),
        (4, 7, 8, 5),  # the keys of a sliding cache
        (2, 16, 10, 0),  # a static cache, filled in part
    ):
        arguments = (3, queries, keys, first_query, first_key, function, mask)
        expected = masking_utils.sdpa_mask(*arguments, allow_is_causal_skip=False)
        bounds = integration.bounds_mask(*arguments)
        assert bounds.shape == (3, 1, queries, 2)
        got = mask_from_lengths(bounds[..., 1], keys, bounds[..., 0])
        assert torch.equal(got, expected.expand(3, 1, queries, keys))


def test_a_tensor_as_offset_of_the_queries() -> None:
    """As a static cache gives it."""
    bounds = integration.bounds_mask(2, 2, 8, torch.tensor(3))
    assert bounds[:, 0, :, 1].tolist() == [[4, 5], [4, 5]]


def test_no_mask_is_built_for_causal_and_bidirectional_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_: Any) -> None:
        raise AssertionError("a mask was built")

    monkeypatch.setattr(integration, "sdpa_mask", refuse)
    tokens, mask = tokens_and_mask("left")
    for auto, model_type in (("AutoModelForCausalLM", "llama"), ("AutoModelForMaskedLM", "bert")):
        train(make_model(auto, model_type), NAME, input_ids=tokens, attention_mask=mask)
    model = make_model("AutoModelForCausalLM", "mistral")
    with pytest.raises(AssertionError, match="a mask was built"):
        train(model, NAME, input_ids=tokens, attention_mask=mask)


# Masks that callers give


def llama(**options: Any) -> Any:
    return make_model("AutoModelForCausalLM", "llama", **options)


def full_tokens() -> Tensor:
    return torch.randint(3, 60, (2, COLS), generator=torch.Generator().manual_seed(4))


def test_packed_sequences() -> None:
    """Several texts in a row, told apart by their positions."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    assert_trains_like_eager(llama(), input_ids=full_tokens(), position_ids=positions)


def test_a_given_mask(softmax_calls: list[Tensor]) -> None:
    """Bool: True where a query attends to a key."""
    mask = torch.ones(COLS, COLS, dtype=torch.bool).tril().triu(-3).expand(2, 1, -1, -1)
    model = llama()
    bias = torch.where(mask, 0.0, -torch.inf)
    expected = train(model, "eager", input_ids=full_tokens(), attention_mask=bias)
    assert_same(train(model, NAME, input_ids=full_tokens(), attention_mask=mask), expected)
    assert all(lengths.max() == 4 for lengths in softmax_calls)


def test_a_given_bias() -> None:
    """A floating point mask is added to the scores; it may have any values."""
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(2, 1, COLS, COLS, generator=generator)
    bias.masked_fill_(
        torch.rand(bias.shape, generator=generator) < 0.3, torch.finfo(bias.dtype).min
    )
    assert_trains_like_eager(llama(), input_ids=full_tokens(), attention_mask=bias)


def mask_with_a_hole() -> Tensor:
    mask = torch.ones(2, COLS, dtype=torch.long)
    mask[1, 4] = 0
    return mask


@pytest.mark.parametrize("model_type", ["bert", "llama", "mistral"])
def test_a_mask_with_a_hole_is_an_error(model_type: str) -> None:
    """A bidirectional, a causal and a windowed one; for BERT, states would differ by 0.56."""
    auto = "AutoModelForMaskedLM" if model_type == "bert" else "AutoModelForCausalLM"
    model = make_model(auto, model_type)
    with pytest.raises(ValueError, match=r"contiguous.*row.* has 2.*attn_implementation=\"eager\""):
        train(model, NAME, input_ids=full_tokens(), attention_mask=mask_with_a_hole())


def test_a_given_mask_with_a_hole_is_an_error() -> None:
    mask = mask_with_a_hole().bool()[:, None, None, :].expand(-1, -1, COLS, -1)
    with pytest.raises(ValueError, match=r"contiguous.*attn_implementation=\"eager\""):
        train(llama(), NAME, input_ids=full_tokens(), attention_mask=mask)


def test_padding_on_the_right_while_decoding_is_an_error() -> None:
    """New tokens follow the padding: a hole."""
    with pytest.raises(ValueError, match="contiguous"):
        generate(llama(), NAME, side="right")


# What else attention does


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "gemma2", "mistral"])
def test_weights(model_type: str) -> None:
    """The same as eager attention's, with zeros exactly where the mask hides a key."""
    model = make_model("AutoModelForCausalLM", model_type)
    tokens, mask = tokens_and_mask("left")
    weights = {}
    for name in (NAME, "eager"):
        model.set_attn_implementation(name)
        output = model(tokens, attention_mask=mask, output_attentions=True)
        weights[name] = torch.stack(output.attentions).transpose(2, 3)[:, mask.bool()].detach()
    assert_same({"weights": weights[NAME]}, {"weights": weights["eager"]})
    assert torch.equal(weights[NAME] == 0, weights["eager"] == 0)
    assert bool((weights[NAME] == 0).any())


def test_dropout() -> None:
    """The same weights are dropped for the same seed."""
    model = llama(attention_dropout=0.3).train()
    tokens, _ = tokens_and_mask("left")
    assert_trains_like_eager(model, input_ids=tokens)
    dropped = train(model, NAME, input_ids=tokens)["output"]
    assert not torch.allclose(dropped, train(model.eval(), NAME, input_ids=tokens)["output"])


def test_queries_without_keys_have_zero_weights() -> None:
    """Tokens in padding on the left, where eager attention attends to padding."""
    model = llama()
    model.set_attn_implementation(NAME)
    tokens, mask = tokens_and_mask("left")
    output = model(tokens, attention_mask=mask, output_attentions=True)
    for weights in output.attentions:
        assert bool((weights.transpose(1, 2)[~mask.bool()] == 0).all())


def test_bfloat16() -> None:
    model = llama(dtype=torch.bfloat16).to(torch.bfloat16)
    tokens, mask = tokens_and_mask("left")
    got, expected = (
        train(model, name, mask.bool(), input_ids=tokens, attention_mask=mask)["output"].float()
        for name in (NAME, "eager")
    )
    assert ((got - expected).abs() <= 0.05 * expected.abs().max()).all()
    assert expected.abs().max() > 0.5


def test_beam_search() -> None:
    assert_generates_like_eager(llama(), num_beams=3)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_compiled(model_type: str) -> None:
    torch._dynamo.reset()
    model = make_model("AutoModelForCausalLM", model_type, num_hidden_layers=1)
    tokens, mask = tokens_and_mask("left")
    expected = train(model, "eager", mask.bool(), input_ids=tokens, attention_mask=mask)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.set_attn_implementation(NAME)
    model.zero_grad()
    output = compiled(input_ids=tokens, attention_mask=mask).logits[mask.bool()]
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert_same({"output": output.detach(), "gradients": gradients}, expected)


def test_compiled_for_any_size() -> None:
    torch._dynamo.reset()

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        bounds = integration.bounds_mask(
            len(query), query.size(2), key.size(2), attention_mask=mask
        )
        return integration.attention(torch.nn.Identity(), query, key, value, bounds)[0]

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for queries in (5, 6, 9):
        tensors = torch.randn(3, 2, 4, queries, 8).unbind()
        mask = mask_from_lengths(torch.tensor([queries, 3]), queries)
        with torch._dynamo.config.patch(error_on_recompile=queries > 5):
            torch.testing.assert_close(compiled(*tensors, mask), attend(*tensors, mask))


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_compiled_mask_with_a_hole_is_an_error(model_type: str) -> None:
    """With sinks too, where an invalid length must remain one."""
    torch._dynamo.reset()
    model = make_model("AutoModelForCausalLM", model_type, num_hidden_layers=1)
    model.set_attn_implementation(NAME)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), pytest.raises(ValueError, match="-1"):
        compiled(input_ids=full_tokens(), attention_mask=mask_with_a_hole())


# What is refused


@pytest.mark.parametrize(
    ("model_type", "options"), [("deepseek_v32", LATENT), ("deepseek_v4", {}), ("doge", {})]
)
def test_models_that_change_their_masks_are_refused(model_type: str, options: Options) -> None:
    """An error of this package or of torch, never another result."""
    model = make_model("AutoModelForCausalLM", model_type, **options)
    tokens, mask = tokens_and_mask("left")
    train(model, "eager", input_ids=tokens, attention_mask=mask)
    with pytest.raises((ValueError, RuntimeError)):
        train(model, NAME, input_ids=tokens, attention_mask=mask)


def heads() -> tuple[Tensor, ...]:
    return torch.randn(3, 2, 4, 5, 8).unbind()


@pytest.mark.parametrize("name", ["indices", "block_indices"])
def test_sparse_attention_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"Identity selects keys by {name}=.*\"eager\""):
        integration.attention(torch.nn.Identity(), *heads(), None, **{name: torch.zeros(2, 5, 3)})


OTHER_MASKS = {
    "sliced bounds": torch.zeros(2, 1, 5, 1, dtype=torch.int64),
    "bounds plus floats": torch.zeros(2, 1, 5, 2),
    "int": torch.ones(2, 1, 5, 5, dtype=torch.int32),
}


@pytest.mark.parametrize("mask", OTHER_MASKS.values(), ids=list(OTHER_MASKS))
def test_other_masks_are_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected what its mask function.*5 keys, but got torch"):
        integration.attention(torch.nn.Identity(), *heads(), mask)


@pytest.mark.parametrize("keys", [1, 2])
def test_a_mask_of_ints_is_not_bounds(keys: int) -> None:
    """Zeros and ones over two keys have the shape and the type of bounds."""
    query, key, value = heads()
    mask = torch.ones(2, 1, 5, 2, dtype=torch.int64)
    message = rf"expected what its mask function.*{keys} keys, but got torch\.int64"
    with pytest.raises(ValueError, match=message):
        integration.attention(
            torch.nn.Identity(), query, key[:, :, :keys], value[:, :, :keys], mask
        )


def test_one_and_two_keys_get_a_mask() -> None:
    """Bounds could be mistaken for a mask of two keys."""
    for keys in (1, 2):
        mask = integration.bounds_mask(2, keys, keys)
        assert torch.equal(mask, torch.ones(keys, keys).tril().bool().expand(2, 1, -1, -1))


def test_another_name() -> None:
    assert integration.register("another_name") == "another_name"
    model = llama()
    tokens, mask = tokens_and_mask("right")
    expected = train(model, NAME, input_ids=tokens, attention_mask=mask)
    assert_same(train(model, "another_name", input_ids=tokens, attention_mask=mask), expected)
