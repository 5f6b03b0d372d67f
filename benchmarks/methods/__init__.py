"""What of each method is timed: a module by its name, with

    rules(unet, counts, latent) -> Iterator[tuple[facts, make]]

for a UNet of ldm's layout, numbers of people, and a square latent's side: what a line of `bench step` says of each rule
and what makes it, ready to be injected; and

    TRAINING: options of its recipe, by the model whose sizes `bench train` takes.
"""
