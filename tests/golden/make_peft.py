"""What transformers and PEFT say to the cases of `tests/peft_cases.py`: writes tests/golden/peft/CASE.

    python tests/golden/make_peft.py [CASE ...]   # torch 2.13.0 (CPU), peft 0.21.2, transformers 5.23; a minute

Each folder holds the adapter as PEFT saved it, and `expected.npz`: logits of the base and of the adapted model, the
gradient of every trained tensor, and its move over three steps of plain SGD, each computed in float32 and in float64.
"""

import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from peft_cases import CASES, STEPS, Case, draw, model_config, tokens

HERE = Path(__file__).parent / "peft"
# What PEFT says of adapted embeddings: that it saves a copy of the base's, and that a tied model needs care.
warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")


def base_model(case: Case) -> LlamaForCausalLM:
    """The model with its weights drawn."""
    model = LlamaForCausalLM(LlamaConfig(**model_config(case), attn_implementation="sdpa"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))))
    return model.eval()


def adapted_model(case: Case) -> peft.PeftModel:
    """The model with PEFT's adapter on it, every trained tensor drawn."""
    model = peft.get_peft_model(base_model(case), peft.LoraConfig(**case.lora))
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))))
    tie(model)
    return model.eval()


def trained(model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """The tensors that train, by their names in the adapter's file; of tied ones, the embedding's."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (model.config.tie_word_embeddings and "lm_head" in name):
            saved = name.replace(".modules_to_save.default", "").replace(".default", "")
            found[saved.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = parameter
    return found


def tied_factors(model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """The head's factors of a model with tied embeddings, by the name of the embedding's factor that they repeat."""
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    twins = {"lora_B": f"{embedding}A", "lora_A": f"{embedding}B"}
    return {
        twin: parameter
        for name, parameter in model.named_parameters()
        for factor, twin in twins.items()
        if model.config.tie_word_embeddings and f"lm_head.{factor}." in name
    }


def tie(model: peft.PeftModel) -> None:
    """The head's factors take on the embedding's values: PEFT shares their memory, which a change of dtype undoes."""
    with torch.no_grad():
        for name, parameter in tied_factors(model).items():
            parameter.copy_(trained(model)[name].T)


def in_double(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64 throughout: by itself, transformers computes norms and all that is rotary in float32.

    Rotary frequencies too, because rounding that the references share would be taken for ours.
    """

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    model = model.double()
    for module in model.modules():
        for kind, forward in (("LlamaRMSNorm", norm), ("LlamaRotaryEmbedding", rotary)):
            if type(module).__name__ == kind:
                module.forward = forward.__get__(module)
        if type(module).__name__ == "LlamaRotaryEmbedding":
            with mock.patch.object(torch, "float", torch.float64):  # what transformers computes frequencies in
                module.inv_freq = type(module)(module.config).inv_freq
            assert module.inv_freq.dtype == torch.float64
    return model


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens())).logits.numpy()


def gradients(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """The loss's gradients by name; those of tied factors added up."""
    model.zero_grad()
    ids = torch.from_numpy(tokens())
    predicted = model(ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(predicted.reshape(-1, predicted.shape[-1]), ids[:, 1:].reshape(-1)).backward()
    found = {name: parameter.grad.clone() for name, parameter in trained(model).items()}
    for name, parameter in tied_factors(model).items():
        found[name] += parameter.grad.T
    return found


def reference(case: Case) -> dict[str, np.ndarray]:
    """All that is compared, as `KIND/DTYPE[/TENSOR]`."""
    found = {}
    for dtype, convert in (("float32", lambda model: model), ("float64", in_double)):
        found[f"base/{dtype}"] = logits(convert(base_model(case)))
        model = convert(adapted_model(case))
        found[f"adapted/{dtype}"] = logits(model)
        before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
        for step in range(STEPS):
            found_gradients = gradients(model)
            with torch.no_grad():
                for name, gradient in found_gradients.items():
                    if step == 0:
                        found[f"gradient/{dtype}/{name}"] = gradient.numpy()
                    trained(model)[name] -= case.learning_rate * gradient
            tie(model)
        for name, parameter in trained(model).items():
            found[f"move/{dtype}/{name}"] = (parameter.detach() - before[name]).numpy()
    return found


def make(folder: Path, case: Case) -> None:
    """Writes the case's adapter and what is expected of it."""
    adapted_model(case).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    np.savez_compressed(folder / "expected.npz", **reference(case))


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        make(HERE / name, CASES[name])
        print(HERE / name)
