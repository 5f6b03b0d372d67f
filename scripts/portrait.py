"""The WebUI's door to Portrait: an AlwaysOn script that hands every callback to `lib_portrait.webui`."""

from modules import script_callbacks, scripts

from lib_portrait.webui import api, axes, jobs, panel, settings


class PortraitScript(scripts.Script):
    def title(self):
        return "Portrait"

    def show(self, is_img2img):
        panel.watch_host(self, is_img2img)
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return panel.build(self, is_img2img)

    def setup(self, p, *values):
        jobs.begin(p)

    def before_process(self, p, *values):
        _session().begin(p, values)

    def process(self, p, *values):
        _session().prepare(p)

    def postprocess(self, p, processed, *values):
        _session().finish(p, processed)


def _session():
    """What happens while a picture is drawn is imported when the first one is: the WebUI starts without it."""
    from lib_portrait.webui import session

    return session


def denoise(params):
    _session().denoise(params)


# What the host's on_cfg_denoiser(...) and its like do, but told this file's name: to find it out they read the source
# of every caller, which takes longer than all the rest of this extension's start.
for category, callback in {
    "cfg_denoiser": denoise,
    "ui_settings": settings.on_ui_settings,
    "before_ui": axes.register,
    "app_started": api.on_app_started,
}.items():
    registered = script_callbacks.callback_map[f"callbacks_{category}"]
    script_callbacks.add_callback(registered, callback, category=category, filename=__file__)
