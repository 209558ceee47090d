"""LoRA adapters of PEFT, trained the same way each time."""

import torch


def lora_losses(model, tokens, steps):
    """Train adapters on a model of transformers, the same each time. Returns the losses."""
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
