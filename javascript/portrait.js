// The Portrait panel's behaviour in the page. Names begin with "portrait": the WebUI has one global scope for all.

// For "New canvas": the size that the finished picture will have, as the panel's text "width x height".
function portraitPictureSize(tab) {
    const number = (name) => Number(gradioApp().querySelector(`#${tab}_${name} input[type=number]`)?.value ?? 0);
    const shown = (selector) => [...gradioApp().querySelectorAll(selector)].find((element) => element.offsetParent);
    // Inpainting of the masked area only is pasted into the whole picture; hires fix may have another shape.
    if (shown("#img2img_inpaint_full_res input:checked")?.value === "Only masked" && tab === "img2img") {
        // The picture itself may be hidden behind what is painted over it.
        const picture = shown("#mode_img2img > .tabitem")?.querySelector("img");
        if (picture) return `${picture.naturalWidth} x ${picture.naturalHeight}`;
    }
    if (gradioApp().querySelector(`#${tab}_hr-checkbox input`)?.checked && number("hr_resize_x") && number("hr_resize_y")) {
        return `${number("hr_resize_x")} x ${number("hr_resize_y")}`;
    }
    return `${number("width") || ""} x ${number("height") || ""}`;
}

// How many photos each identity has, in the tabs, and how many people there are, in the folded panel's title.
function portraitShowCounts() {
    for (const tab of ["txt2img", "img2img"]) {
        const panel = gradioApp().querySelector(`#${tab}_portrait`);
        const title = panel?.querySelector(".label-wrap > span");
        if (!title) continue;
        let people = 0;
        panel.querySelectorAll(`#${tab}_portrait_people > .tab-nav > button`).forEach((button, index) => {
            const found = panel.querySelector(`#${tab}_portrait_${index}_photos_found`);
            const photos = found?.querySelectorAll(".portrait-card").length ?? 0;
            people += photos > 0;
            portraitSetData(button, "portraitPhotos", photos ? String(photos) : "");
            portraitSetData(button, "portraitProblem", found?.querySelector(".portrait-card-error") ? "yes" : "");
        });
        const enabled = panel.querySelector(`#${tab}_portrait_enabled input`)?.checked ?? false;
        const count = people === 1 ? "1 person" : people ? `${people} people` : "";
        portraitSetData(title, "portraitPeople", enabled ? count || "no photos yet" : count && `${count}, off`);
        portraitSetData(title, "portraitEnabled", enabled ? "yes" : "");
        const weights = panel.querySelector(".portrait-weights :is(.portrait-warning, .portrait-error)");
        portraitSetData(title, "portraitProblem", enabled && weights ? "yes" : "");
    }
}

function portraitSetData(element, name, value) {
    if ((element.dataset[name] ?? "") === value) return;
    if (value) {
        element.dataset[name] = value;
    } else {
        delete element.dataset[name];
    }
}

// The buttons of a card change its photo's entry in the hidden list beside the cards; the panel then draws anew.
function portraitChangePhoto(button) {
    const found = button.closest("[id$=_photos_found]");
    const kept = found && gradioApp().querySelector(`#${found.id.slice(0, -"_found".length)} textarea`);
    if (!kept) return;
    let photos;
    try {
        photos = JSON.parse(kept.value || "[]");
    } catch (error) {
        photos = [];
    }
    const index = Number(button.closest(".portrait-card").dataset.index);
    const entry = photos[index];
    const {image, ...own} = typeof entry === "string" ? {image: entry} : entry ?? {};
    if (button.matches(".portrait-remove") || !image) {
        photos.splice(index, 1);
    } else {
        if (button.matches(".portrait-face")) {
            own.face = Number(button.dataset.face);
        } else if (own.aligned) {
            delete own.aligned;
        } else {
            own.aligned = true;
        }
        photos[index] = Object.keys(own).length ? {image, ...own} : image;
    }
    kept.value = photos.length ? JSON.stringify(photos) : "";
    updateInput(kept);
}

document.addEventListener("click", (event) => {
    const button = event.target.closest?.(".portrait-card button");
    if (button) portraitChangePhoto(button);
});

// Which weights are missing depends on the checkpoint that is loaded: asked when the page is there, and after a change.
let portraitCheckpoint = false;
function portraitLookAtWeights() {
    if (opts.sd_model_checkpoint === portraitCheckpoint) return;
    portraitCheckpoint = opts.sd_model_checkpoint;
    for (const tab of ["txt2img", "img2img"]) gradioApp().querySelector(`#${tab}_portrait_refresh`)?.click();
}

onAfterUiUpdate(portraitShowCounts);
onOptionsChanged(portraitLookAtWeights);
