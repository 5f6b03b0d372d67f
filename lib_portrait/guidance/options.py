"""What RB-Guidance (OmniPortrait, section 3.3) lets people choose. Its defaults are the paper's rule.

Everything here is standard library.
"""

from lib_portrait.options import Choice, Number, Switch

STRENGTH = Number(
    name="strength",
    title="Strength (p)",
    help="how strongly the reference guides (p of eq. 10), or the gradient's share of the noise prediction's norm",
    default=8.5,
    low=0.0,
    high=1000.0,
    axis="Guidance strength",
)
BEGIN = Number(
    name="begin",
    title="From which step on (u)",
    help="guided are the steps at timesteps t up to u T (eq. 11): 1 from the start, 0.6 in the last 60 %",
    default=0.6,
    low=0.0,
    high=1.0,
    axis="Guidance begin",
)
REFERENCE_T = Number(
    name="reference_t",
    title="Reference's noise (t0)",
    help="how noisy the reference is where its features are taken, of 1000 timesteps",
    default=671,
    low=0,
    high=999,
    whole=True,
    axis="Guidance reference noise",
)
NOISE = Choice(
    name="noise",
    title="Reference noised",
    help="to t0, once, as in the paper, or to each step's own timestep, which costs a UNet call a guided step",
    default="fixed",
    choices={"fixed": "To t0", "step": "As the step"},
    axis="Guidance noise",
)
FEATURES = Choice(
    name="features",
    title="Features",
    help="compared as they are, as in the paper, or with each channel centred and scaled over the reference",
    default="plain",
    choices={"plain": "As they are", "centred": "Centred"},
    axis="Guidance features",
)
REDUCTION = Choice(
    name="reduction",
    title="Similarity",
    help="summed over the reference's positions (eq. 8), or their mean, which guides more strongly",
    default="sum",
    choices={"sum": "Sum", "mean": "Mean"},
    axis="Guidance similarity",
)
GRADIENT = Choice(
    name="gradient",
    title="Gradient",
    help="added as it is (eq. 11), or scaled to the strength as a share of the noise prediction's norm",
    default="plain",
    choices={"plain": "As it is", "share": "Share of the noise"},
    axis="Guidance gradient",
)
BLOCK = Number(
    name="block",
    title="Decoder block",
    help="which of the UNet's decoder blocks, counted from 0, the features come from",
    default=1,
    low=0,
    high=3,
    whole=True,
    axis="Guidance block",
)
EVERY = Number(
    name="every",
    title="Every k-th step",
    help="guides one step of so many, which is faster",
    default=1,
    low=1,
    high=20,
    whole=True,
    axis="Guidance every",
)
WHERE = Choice(
    name="where",
    title="Where",
    help="what says where a person's face is: what is there, in the order of this list, or one of them for certain",
    default="automatic",
    choices={
        "automatic": "Automatic",
        "region": "Region",
        "attention": "Attention map of the word",
        "routing": "Routing map of the method",
        "face": "Face found in the picture",
    },
    axis="Guidance where",
)
ROUNDS = Number(
    name="rounds",
    title="Rounds (γ)",
    help="how often the attention map is normalised and raised to a power (eq. 6)",
    default=3,
    low=0,
    high=10,
    whole=True,
    axis="Guidance rounds",
)
POWER = Number(
    name="power",
    title="Power (α)",
    help="to which the attention map is raised each time (eq. 6)",
    default=2.0,
    low=0.0,
    high=10.0,
    axis="Guidance power",
)
THRESHOLD = Number(
    name="threshold",
    title="Threshold (β)",
    help="above which the attention map counts as the face (eq. 6)",
    default=0.5,
    low=0.0,
    high=1.0,
    axis="Guidance threshold",
)
CHECKPOINTING = Switch(
    name="checkpointing",
    title="Save memory",
    help="computes the blocks anew for the gradient instead of keeping what they held: less memory, slower",
)
SHOW = Switch(
    name="show",
    title="Show where it acted",
    help="append the masks and the energy of each step to the resulting pictures",
)

OPTIONS = (
    STRENGTH,
    BEGIN,
    REFERENCE_T,
    NOISE,
    FEATURES,
    REDUCTION,
    GRADIENT,
    BLOCK,
    EVERY,
    WHERE,
    ROUNDS,
    POWER,
    THRESHOLD,
    CHECKPOINTING,
    SHOW,
)

GUIDED = Switch(
    name="guided",
    title="Guided by the reference",
    help="whether reference guidance acts on this person",
    default=True,
)

IDENTITY_OPTIONS = (GUIDED,)
