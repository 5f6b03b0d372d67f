"""What of each method `bench step` times: a module by its name, with

    rules(unet, counts) -> Iterator[tuple[facts, make]]

for a UNet of ldm's layout and numbers of people: what a line of results says of each rule, and what makes it, ready to
be injected.
"""
