"""What of each method `bench step` times: a module by its name, with

    rules(unet, counts, latent) -> Iterator[tuple[facts, make]]

for a UNet of ldm's layout, numbers of people, and a square latent's side: what a line of results says of each rule, and
what makes it, ready to be injected.
"""
