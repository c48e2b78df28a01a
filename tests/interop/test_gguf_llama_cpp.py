"""llama.cpp loads our files, tokenizes as we do, and computes what `qjax.apply` computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.evaluate import split_windows
from qjax.interop.gguf import open_gguf
from qjax.models import load_gguf
from qjax.models.gguf import save_gguf
from qjax.models.load import package_file
from qjax.texts import load_text
from tests.interop.llama_cpp import Llama
from tests.test_cli import run

pytestmark = [pytest.mark.judge, pytest.mark.demo]
xllamacpp = pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def smollm2():
    from qjax.models import load

    return load("smollm2")


def log_softmax(x):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(x, jnp.float32), -1))


def runner(packed):
    """Returns a function from tokens to log-probabilities [T, V], on the weights as stored."""
    apply = jax.jit(qjax.apply(packed.model.apply))
    return lambda tokens: log_softmax(apply({"params": packed.params}, jnp.asarray([tokens])))[0]


def compare(ours, llama, windows):
    """Returns the mean KL, and mean and standard error of the difference of the NLL."""
    kl, difference = [], []
    for tokens in windows.tolist():
        p, q = ours(tokens), log_softmax(llama.logits(tokens))
        kl.append(np.mean(np.sum(np.exp(p) * (p - q), -1)))
        at = np.arange(len(tokens) - 1), np.asarray(tokens[1:])
        difference.append(p[:-1][at] - q[:-1][at])
    difference = np.concatenate(difference)
    return np.mean(kl), np.mean(difference), np.std(difference) / np.sqrt(len(difference))


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["F32", "Q8_0", "Q4_K_M", "Q3_K_M", "Q2_K"])
def test_its_logits_are_ours_on_the_same_packed_weights(smollm2, mix, tmp_path):
    path = tmp_path / "m.gguf"
    save_gguf(path, smollm2.params, smollm2.config, smollm2.tokenizer, mix=mix, verify=True)
    packed = load_gguf(path, packed=True)
    llama = Llama(path, xllamacpp)
    text = load_text("wiki", "evaluation")[:10_000]
    tokens = llama.tokenize(text)
    assert tokens == packed.tokenizer.encode(text)
    kl, mean, error = compare(runner(packed), llama, split_windows(tokens, 512, 4))
    llama.close()
    print(f"{mix}: KL {kl:.2e}, NLL of llama.cpp {mean:+.4f} ± {error:.4f}")
    # llama.cpp rounds activations to 8 bits, in blocks, for all types but floats; with those only
    # keys and values, to float16.
    assert kl < (1e-5 if mix == "F32" else 1e-2)
    assert abs(mean) < (1e-3 if mix == "F32" else 0.01)  # 1 % of the perplexity


@pytest.mark.slow
def test_a_file_of_llama_cpp_goes_through_gptq_on_the_grid_of_q4_k_and_generates(tmp_path):
    """GGUF Q4_1, as its makers published it -> qjax -> GPTQ -> GGUF Q4_K_M -> llama.cpp."""
    source, path = package_file("smollm2"), tmp_path / "m.gguf"
    assert open_gguf(source).tensors["blk.0.ffn_down.weight"].kind.name == "Q4_1"
    few = ["--calibration-windows", "5", "--calibration-window", "128"]
    run("convert", source, path, "--to", "gguf:Q4_K_M", "--calibration", "wiki", *few, "--verify")
    kinds = {t.kind.name for n, t in open_gguf(path).tensors.items() if "ffn_down" in n}
    assert kinds == {"Q4_K", "Q6_K"}
    packed, llama = load_gguf(path, packed=True), Llama(path, xllamacpp)
    ours = runner(packed)
    windows = split_windows(packed.tokenizer.encode(load_text("wiki", "evaluation")), 512, 1)
    kl, mean, error = compare(ours, llama, windows)
    prompt = "The three primary colours are"
    tokens = llama.tokenize(prompt)
    made = llama.continued(tokens, 24)
    llama.close()
    print(f"KL {kl:.2e}, NLL {mean:+.4f} ± {error:.4f}: {prompt}|{packed.tokenizer.decode(made)}")
    assert kl < 1e-2
    assert abs(mean) < 0.01 + 2 * error
    # What it finds likeliest is so for us, or as good as: its activations have 8 bits.
    p = ours(tokens + made)[len(tokens) - 1 : -1]
    assert np.all(p[np.arange(len(made)), made] > p.max(-1) - 0.5)
