"""What is sampled has the distribution that the model and the sampler define, found by enumeration of a toy model.

Seeds are fixed; a chi-square statistic of k degrees of freedom has mean k and standard deviation sqrt(2 k).
"""

import itertools
import math

import pytest
import torch
from decoders import tiny_decoder
from published_scores import analytic_weights, denoising_weights, log_score
from shared_models import randomized

from bd3lm_hf import ARConfig, ARForCausalLM, MDLMConfig, MDLMForMaskedLM, SEDDConfig, SEDDForMaskedLM
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.logits_process_bd3lm import NucleusLogitsProcessor
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM


SAMPLES = 12_000
PAD = 4  # an id behind the three tokens and the mask, so that prompts of two lengths share a batch


@pytest.fixture(scope="module")
def model() -> BD3LMForMaskedLM:
    """Three tokens, the mask (3) and padding (4) in blocks of 3; its distributions depend on what is revealed."""
    fields = {"block_size": 3, "model_length": 9, "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    return of_three_tokens(BD3LMForMaskedLM, BD3LMConfig, vocab_size=5, mask_token_id=3, **fields)


def of_three_tokens(model_class, config_class, **fields):
    """A model whose distributions depend on what is revealed."""
    sizes = {"hidden_dim": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 2}
    model = randomized(model_class(config_class(**sizes, **fields)), std=0.2).eval()
    with torch.no_grad():
        for layer in model.backbone.blocks:
            layer.attn_qkv.weight.mul_(4)
    return model


def hitting_plans(places: int) -> dict[tuple[int, ...], float]:
    """First hitting: the step that reveals each place, every order equally likely."""
    orders = list(itertools.permutations(range(places)))
    return {order: 1 / len(orders) for order in orders}


def ancestral_plans(places: int, steps: int) -> dict[tuple[int, ...], float]:
    """Each place is revealed in step k with probability 1 / steps, on a log-linear grid, whatever the others do."""
    return dict.fromkeys(itertools.product(range(steps), repeat=places), steps ** (-places))


@torch.no_grad()
def exact_block(model, context: list[int], plans: dict[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """The distribution of the rest of the block behind `context`, summed over the plans of revealing it."""
    count = model.config.block_size - len(context) % model.config.block_size
    states = list(itertools.product(range(4), repeat=count))
    logits = model(torch.tensor([context + list(state) for state in states])).logits[:, len(context) :, :3]
    probability = dict(zip(states, logits.double().softmax(-1).tolist(), strict=True))
    result = dict.fromkeys(itertools.product(range(3), repeat=count), 0.0)
    for outcome, (plan, weight) in itertools.product(result, plans.items()):
        state = [3] * count
        for step in sorted(set(plan)):
            now = tuple(state)
            for place in range(count):
                if plan[place] == step:
                    weight *= probability[now][place][outcome[place]]
                    state[place] = outcome[place]
        result[outcome] += weight
    assert math.isclose(sum(result.values()), 1.0, abs_tol=1e-9)
    return result


def chi_square(samples: torch.Tensor, exact: dict[tuple[int, ...], float]) -> float:
    """Over all outcomes, of samples `(count, tokens)`; asserts that each is likely enough to be tested."""
    code = sum(samples[:, place] * 3 ** (samples.shape[1] - 1 - place) for place in range(samples.shape[1]))
    counts = torch.bincount(code, minlength=len(exact))
    expected = len(samples) * torch.tensor(list(exact.values()), dtype=torch.float64)
    assert len(counts) == len(expected) and expected.min() > 5
    return float(((counts - expected) ** 2 / expected).sum())


def assert_distributed(samples: torch.Tensor, exact: dict[tuple[int, ...], float]) -> None:
    freedom = len(exact) - 1
    assert chi_square(samples, exact) < freedom + 4 * math.sqrt(2 * freedom)


def sample(model, ids: torch.Tensor, count: int, **arguments) -> torch.Tensor:
    """`count` new tokens behind each row."""
    arguments |= {"do_sample": True, "generator": torch.Generator().manual_seed(0)}
    texts = model.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=count, **arguments)
    return texts[:, ids.shape[1] :]


CONTEXT = [1, 0, 2]
EXACT = [{"sampler": "first_hitting"}, {"sampler": "ancestral", "num_denoising_steps": 5000}]


def test_the_toy_can_tell_samplers_apart(model):
    # Else what follows would show nothing: the samplers' distributions differ by more than the tests let pass.
    exact = exact_block(model, CONTEXT, hitting_plans(3))
    freedom = len(exact) - 1
    for other in (ancestral_plans(3, 1), ancestral_plans(3, 2), {(0, 1, 2): 1.0}):
        wrong = exact_block(model, CONTEXT, other)
        distance = sum(SAMPLES * (wrong[outcome] - exact[outcome]) ** 2 / exact[outcome] for outcome in exact)
        assert distance > 8 * math.sqrt(2 * freedom), distance


@pytest.mark.parametrize("sampling_dtype", ["float32", "float64"])
@pytest.mark.parametrize("sampler", EXACT, ids=lambda fields: fields["sampler"])
def test_a_block_has_the_joint_distribution_of_the_model(model, sampler, sampling_dtype):
    ids = torch.tensor([CONTEXT]).expand(SAMPLES, -1)
    samples = sample(model, ids, 3, sampling_dtype=sampling_dtype, **sampler)
    assert_distributed(samples, exact_block(model, CONTEXT, hitting_plans(3)))


@pytest.mark.parametrize("sampler", EXACT, ids=lambda fields: fields["sampler"])
def test_rows_with_unequal_prompts_have_it_too(model, sampler):
    # Shorter than a block, a whole block, and one that ends inside a block; their blocks end together.
    prompts = [[1], CONTEXT, [0, 2, 1, 1, 0]]
    ids = torch.tensor([[PAD] * (5 - len(prompt)) + prompt for prompt in prompts]).repeat(SAMPLES // 2, 1)
    samples = sample(model, ids, 2, **sampler)
    for row, prompt in enumerate(prompts):
        count = 3 - len(prompt) % 3
        exact: dict[tuple[int, ...], float] = {}
        for block, probability in exact_block(model, prompt, hitting_plans(count)).items():
            following = {(): 1.0} if count >= 2 else exact_block(model, prompt + list(block), hitting_plans(3))
            for behind, weight in following.items():
                outcome = (*block, *behind)[:2]
                exact[outcome] = exact.get(outcome, 0.0) + probability * weight
        assert_distributed(samples[row::3], dict(sorted(exact.items())))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_ancestral_steps_have_the_distribution_of_their_grid(model, steps):
    ids = torch.tensor([CONTEXT]).expand(SAMPLES, -1)
    samples = sample(model, ids, 3, sampler="ancestral", num_denoising_steps=steps)
    assert_distributed(samples, exact_block(model, CONTEXT, ancestral_plans(3, steps)))


def test_a_position_that_is_predicted_again_is_not_drawn_again(model):
    # Where nothing is learnt between the steps, the sampler that accepts what is likely must not favour the likely.
    with torch.no_grad():
        flat = BD3LMForMaskedLM(model.config).eval()  # its logits are its bias: no token depends on another
        flat.get_output_embeddings().bias[:3] = torch.tensor([0.96, 0.03, 0.01]).log()
    ids = torch.tensor([CONTEXT]).expand(SAMPLES, -1)
    samples = sample(flat, ids, 3, sampler="confidence", confidence_threshold=0.5)
    counts = samples.flatten().bincount(minlength=3) / (3 * SAMPLES)
    torch.testing.assert_close(counts, torch.tensor([0.96, 0.03, 0.01]), atol=5 * 0.001, rtol=0)


@pytest.mark.parametrize("alignment", ["same", "shifted"])
def test_samples_of_an_adapted_decoder_have_the_joint_distribution_too(alignment):
    fields = {"vocab_size": 5, "mask_token_id": 3, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
    decoder = tiny_decoder("llama", **fields, block_size=3, model_length=9, alignment=alignment)
    decoder.get_output_embeddings().weight.data.mul_(2)  # so that the samplers' distributions differ
    samples = sample(decoder, torch.tensor([CONTEXT]).expand(SAMPLES, -1), 3)
    assert_distributed(samples, exact_block(decoder, CONTEXT, hitting_plans(3)))


# The baselines, of the same three tokens


def baseline(model_class, config_class, **fields):
    """A baseline of three tokens and the mask (3)."""
    model = of_three_tokens(model_class, config_class, **{"vocab_size": 4, "model_length": 4, **fields})
    model.get_output_embeddings().weight.data.mul_(0.4)
    return model


@torch.no_grad()
def chain_rule(model, prompt: list[int], count: int) -> dict[tuple[int, ...], float]:
    """The distribution of `count` tokens after a prompt, each from a pass of its own over the window before it."""
    result = dict.fromkeys(itertools.product(range(3), repeat=count), 1.0)
    for outcome in result:
        text = list(prompt)
        for token in outcome:
            logits = model(torch.tensor([text[-model.config.model_length :]])).logits[0, -1].double()
            logits[3] = -torch.inf
            result[outcome] *= float(logits.softmax(-1)[token])
            text.append(token)
    return result


@pytest.mark.parametrize(
    ("count", "fields"), [(2, {}), (3, {"window": "exact"}), (3, {"use_cache": False})], ids=["cache", "exact", "none"]
)
def test_autoregressive_rows_with_unequal_prompts_have_it_too(count, fields):
    # Three tokens behind the longer prompt outgrow the window. No token is like padding, which is no part of a text.
    model = baseline(ARForCausalLM, ARConfig, vocab_size=5, mask_token_id=3, pad_token_id=PAD)
    model.get_output_embeddings().bias.data[PAD] = -torch.inf
    prompts = [[1], [0, 2, 1]]
    ids = torch.tensor([[PAD] * (3 - len(prompt)) + prompt for prompt in prompts]).repeat(SAMPLES, 1)
    samples = sample(model, ids, count, **fields)
    exact = [chain_rule(model, prompt, count) for prompt in prompts]
    for row in range(2):
        assert math.isclose(sum(exact[row].values()), 1.0, abs_tol=1e-9)
        assert_distributed(samples[row::2], exact[row])
    assert chi_square(samples[::2], exact[1]) > 1000  # it could tell them apart


@pytest.mark.parametrize("sampler", EXACT, ids=lambda fields: fields["sampler"])
def test_masked_diffusion_samples_have_the_joint_distribution_of_the_model(sampler):
    model = baseline(MDLMForMaskedLM, MDLMConfig)
    samples = sample(model, torch.ones(SAMPLES, 1, dtype=torch.long), 3, **sampler)
    assert_distributed(samples, exact_block(model, [1], hitting_plans(3)))


@torch.no_grad()
def score_chain(model, steps: int, nucleus_p: float = 1.0) -> dict[tuple[int, ...], float]:
    """The distribution of three tokens behind a 1 under the published weights of the analytic sampler."""
    states = list(itertools.product(range(4), repeat=3))
    texts = torch.tensor([[1, *state] for state in states])
    times = torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64)
    sigmas = (-torch.log1p(-times)).clamp(max=-math.log(1e-3))
    occupied = torch.zeros(64, dtype=torch.float64)
    occupied[-1] = 1.0
    for number, sigma in enumerate(sigmas):
        level = sigma.expand(64)
        score = log_score(model(texts, timesteps=level.float()).logits.double(), texts, level)
        if nucleus_p < 1:
            score = NucleusLogitsProcessor(nucleus_p)(None, score).log_softmax(-1)
        if number < steps:
            weights = analytic_weights(score.exp(), texts, level, sigmas[number + 1].expand(64), 3)
        else:
            weights = denoising_weights(score.exp(), texts, level, 3)
        move = weights[:, 1:].clamp(min=0)
        known = torch.nn.functional.one_hot(texts[:, 1:], 4).double()
        move = torch.where((texts[:, 1:] == 3).unsqueeze(-1), move, known)
        move = move / move.sum(-1, keepdim=True)
        occupied = occupied @ torch.einsum("sa,sb,sc->sabc", *move.unbind(1)).reshape(64, 64)
    return {state: float(p) for state, p in zip(states, occupied, strict=True) if 3 not in state}


@pytest.mark.parametrize(("steps", "nucleus_p"), [(1, 1.0), (3, 1.0), (4, 0.97)])
def test_score_samples_have_the_distribution_of_the_published_weights(steps, nucleus_p):
    model = baseline(SEDDForMaskedLM, SEDDConfig)
    exact = score_chain(model, steps, nucleus_p)
    assert math.isclose(sum(exact.values()), 1.0, abs_tol=1e-6)
    prompts = torch.ones(SAMPLES, 1, dtype=torch.long)
    samples = sample(model, prompts, 3, num_denoising_steps=steps, nucleus_p=nucleus_p)
    reachable = torch.tensor([p > 3 / SAMPLES for p in exact.values()])
    code = samples @ torch.tensor([9, 3, 1])
    assert reachable.sum() > 4 and (~reachable)[code].sum() < 60
    counts = code.bincount(minlength=27)[reachable]
    expected = SAMPLES * torch.tensor(list(exact.values()), dtype=torch.float64)[reachable]
    freedom = int(reachable.sum()) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom)
