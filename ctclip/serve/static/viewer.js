// The scan in NiiVue. Only this file depends on NiiVue.
"use strict";

const viewer = (() => {
  let nv = null;
  let tell = { place: () => {}, distance: () => {}, window: () => {}, zoom: () => {} };
  const planes = {};
  let library = null;

  // NiiVue is large, so it is loaded after the page has been drawn.
  function load() {
    library ??= new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = "/static/niivue.umd.js";
      script.onload = done;
      script.onerror = () => { library = null; failed(new Error("the viewer could not be loaded; try again")); };
      document.head.append(script);
    });
    return library;
  }

  // ``listeners``: see ``tell``.
  async function start(canvas, listeners) {
    await load();
    tell = { ...tell, ...listeners };
    nv = new niivue.Niivue({
      backColor: [0, 0, 0, 1], show3Dcrosshair: true, crosshairColor: [1, 0.85, 0, 0.8], crosshairWidth: 1, crosshairWidthUnit: "mm", crosshairGap: 8,
      isRadiologicalConvention: true, isOrientationTextVisible: true, isRuler: true, rulerWidth: 3, rulerColor: [1, 1, 1, 0.9], showAllOrientationMarkers: true, loadingText: "", logLevel: "error",
      multiplanarForceRender: false, multiplanarShowRender: niivue.SHOW_RENDER.NEVER, fontColor: [1, 1, 1, 1], dragAndDropEnabled: false, sagittalNoseLeft: true, fontSizeScaling: 0.7, multiplanarPadPixels: 4,
      measureLineColor: [1, 0.85, 0, 1], measureTextColor: [1, 0.85, 0, 1],
    });
    annotate();
    // NiiVue focuses the canvas at every click; if the page scrolled, it would move during a measurement.
    canvas.focus = () => HTMLElement.prototype.focus.call(canvas, { preventScroll: true });
    gestures.listen(canvas, { scroll, zoom, pan });
    await nv.attachToCanvas(canvas);
    Object.assign(planes, {
      all: nv.sliceTypeMultiplanar, axial: nv.sliceTypeAxial, coronal: nv.sliceTypeCoronal,
      sagittal: nv.sliceTypeSagittal, render: nv.sliceTypeRender,
    });
    nv.onMeasurementCompleted = ({ distance }) => tell.distance(distance);
    // With the right mouse button a window is chosen by hand.
    nv.onIntensityChange = ({ cal_min, cal_max }) => tell.window(cal_min, cal_max);
    nv.onLocationChange = (place) => tell.place({ mm: Array.from(place.mm).slice(0, 3), hu: place.values[0] && place.values[0].value });
  }

  // Letters and ruler as NiiVue draws them, legible on bright and dark tissue, and not over each other.
  function annotate() {
    const drawRuler = nv.drawRuler.bind(nv), drawText = nv.drawText.bind(nv), drawLetters = nv.drawSliceOrientationText.bind(nv);
    // NiiVue draws no ruler in the radiological convention, in which the field of view runs to the left.
    nv.drawRuler = () => {
      const slices = nv.screenSlices, room = 1.5 * nv.fontPx;
      nv.screenSlices = slices.map((slice) => {
        const [left, top, width, height] = slice.leftTopWidthHeight;
        return { ...slice, fovMM: Array.from(slice.fovMM, Math.abs), leftTopWidthHeight: [left, top, width, height - room] };
      });
      drawRuler();
      nv.screenSlices = slices;
    };
    nv.drawText = (at, text, ...rest) => {
      const edge = nv.uiData.dpr;
      for (const [x, y] of [[-1, -1], [-1, 1], [1, -1], [1, 1]]) drawText([at[0] + x * edge, at[1] + y * edge], text, rest[0], [0, 0, 0, 1]);
      drawText(at, text, ...rest);
    };
    nv.drawSliceOrientationText = ([left, top, width, height], ...rest) => {
      const edge = 4 * nv.uiData.dpr;
      drawLetters([left + edge, top + edge, width - 2 * edge, height - 2 * edge], ...rest);
    };
  }

  // Drawn once, in its window.
  async function show(buffer, low, high) {
    nv.clearMeasurements();
    whole();
    while (nv.volumes.length) nv.removeVolumeByIndex(0);
    await nv.addVolumeFromUrl({ url: "scan.nii.gz", name: "scan.nii.gz", buffer, colormap: "gray", cal_min: low, cal_max: high });
    nv.createOnLocationChange();
  }

  // Overlay a map, or remove it.
  async function overlay(buffer, low, high) {
    while (nv.volumes.length > 1) nv.removeVolumeByIndex(1);
    if (!buffer) return nv.volumes.length && nv.updateGLVolume();
    await nv.addVolumeFromUrl({ url: "map.nii.gz", name: "map.nii.gz", buffer, colormap: "inferno", opacity: 0.45, cal_min: low, cal_max: high });
  }

  function view(name) { nv.setSliceType(planes[name]); }
  function range(low, high) { const scan = nv.volumes[0]; scan.cal_min = low; scan.cal_max = high; nv.updateGLVolume(); }
  function ruler(on) { if (!on) nv.clearMeasurements(); nv.opts.dragModePrimary = niivue.DRAG_MODE[on ? "measurement" : "crosshair"]; nv.drawScene(); }
  function to(mm) { nv.scene.crosshairPos = nv.mm2frac(mm); nv.drawScene(); nv.createOnLocationChange(); }
  function position() { return Array.from(nv.frac2mm(nv.scene.crosshairPos)).slice(0, 3); }
  function step(x, y, z) { nv.moveCrosshairInVox(x, y, z); }

  // ``at``: a point of the window in CSS pixels; the position there in mm, or null where no slice is drawn.
  function under(at) {
    const box = nv.canvas.getBoundingClientRect(), scale = nv.uiData.dpr;
    const mm = nv.screenXY2mm((at.x - box.left) * scale, (at.y - box.top) * scale);
    return Number.isFinite(mm[0]) ? Array.from(mm).slice(0, 3) : null;
  }

  // By whole slices of the plane that is drawn at ``at``.
  function scroll(slices, at) {
    const event = { bubbles: true, cancelable: true, clientX: at.x, clientY: at.y, deltaY: -Math.sign(slices) };
    for (let number = 0; number < Math.abs(slices); number++) nv.canvas.dispatchEvent(new WheelEvent("wheel", event));
  }

  // About the position at ``at``, which stays where it is, or about the crosshair.
  function zoom(factor, at) {
    const [x, y, z, before] = nv.scene.pan2Dxyzmm;
    const after = Math.min(10, Math.max(1, before * factor)), fixed = (at && under(at)) || position();
    if (after === 1) return whole();
    nv.setPan2Dxyzmm([...[x, y, z].map((value, axis) => value + (before - after) * fixed[axis]), after]);
    tell.zoom(after);
  }

  function pan(from, to) {
    const [start, end] = [under(from), under(to)], [x, y, z, scale] = nv.scene.pan2Dxyzmm;
    if (start && end && scale > 1) nv.setPan2Dxyzmm([...[x, y, z].map((value, axis) => value + scale * (end[axis] - start[axis])), scale]);
  }

  function whole() { nv.setPan2Dxyzmm([0, 0, 0, 1]); tell.zoom(1); }
  function picture() { nv.drawScene(); return nv.canvas.toDataURL("image/png"); }

  return { load, start, show, overlay, view, range, ruler, to, at: position, step, zoom, whole, picture };
})();
