"""The WebUI's door to Portrait: an AlwaysOn script that hands every callback to `lib_portrait.webui`."""

from modules import script_callbacks, scripts

from lib_portrait.webui import api, axes, panel, session, settings


class PortraitScript(scripts.Script):
    def title(self):
        return "Portrait"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return panel.build(self, is_img2img)

    def before_process(self, p, *values):
        session.begin(p, values)

    def process(self, p, *values):
        session.prepare(p)

    def postprocess(self, p, processed, *values):
        session.finish(p, processed)


script_callbacks.on_cfg_denoiser(session.denoise)
script_callbacks.on_ui_settings(settings.on_ui_settings)
script_callbacks.on_before_ui(axes.register)
script_callbacks.on_app_started(api.on_app_started)
