"""llama.cpp loads our files, tokenizes as we do, and computes what `qjax.apply` computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.models import load_gguf
from qjax.models.gguf import save_gguf
from qjax.texts import load_text
from tests.interop.llama_cpp import Llama

pytestmark = [pytest.mark.judge, pytest.mark.demo]
xllamacpp = pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def smollm2():
    from qjax.models import load

    return load("smollm2")


def log_softmax(x):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(x, jnp.float32), -1))


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["F32", "Q8_0", "Q4_K_M", "Q3_K_M", "Q2_K"])
def test_its_logits_are_ours_on_the_same_packed_weights(smollm2, mix, tmp_path):
    path = tmp_path / "m.gguf"
    save_gguf(path, smollm2.params, smollm2.config, smollm2.tokenizer, mix=mix, verify=True)
    packed = load_gguf(path, packed=True)
    llama = Llama(path, xllamacpp)
    text = load_text("wiki", "evaluation")[:2400]
    tokens = llama.tokenize(text)
    assert tokens == packed.tokenizer.encode(text)
    tokens = tokens[:512]
    apply = jax.jit(qjax.apply(packed.model.apply))
    ours = apply({"params": packed.params}, jnp.asarray([tokens]))
    ours = log_softmax(ours[0] if isinstance(ours, tuple) else ours)[0]
    theirs = log_softmax(llama.logits(tokens))
    llama.close()
    # llama.cpp rounds activations to 8 bits, in blocks, for all types but floats.
    kl = np.mean(np.sum(np.exp(ours) * (ours - theirs), -1))
    at = np.arange(len(tokens) - 1), np.asarray(tokens[1:])
    difference = ours[:-1][at] - theirs[:-1][at]  # of the NLL, token by token
    mean, error = np.mean(difference), np.std(difference) / np.sqrt(len(difference))
    print(f"{mix}: KL {kl:.2e}, NLL of llama.cpp {mean:+.4f} ± {error:.4f}")
    # With floats it rounds only keys and values, to float16.
    assert kl < (1e-5 if mix == "F32" else 1e-2)
    # 1 % of the perplexity, as far as 511 tokens can tell.
    assert abs(mean) < (1e-3 if mix == "F32" else 0.01 + 2 * error)
