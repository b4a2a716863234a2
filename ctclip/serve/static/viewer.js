// The scan in NiiVue. Only this file depends on NiiVue.
"use strict";

const viewer = (() => {
  let nv = null;
  let told = () => {}, measured = () => {};
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

  async function start(canvas, onPlace, onDistance) {
    await load();
    [told, measured] = [onPlace, onDistance];
    nv = new niivue.Niivue({
      backColor: [0, 0, 0, 1], show3Dcrosshair: true, crosshairColor: [1, 0.85, 0, 0.8], crosshairWidth: 1, crosshairWidthUnit: "mm", crosshairGap: 8,
      isRadiologicalConvention: true, isOrientationTextVisible: true, isRuler: true, rulerWidth: 3, rulerColor: [1, 1, 1, 0.9], showAllOrientationMarkers: true, loadingText: "", logLevel: "error",
      multiplanarForceRender: false, multiplanarShowRender: niivue.SHOW_RENDER.NEVER, fontColor: [1, 1, 1, 1], dragAndDropEnabled: false, sagittalNoseLeft: true, fontSizeScaling: 0.7,
      measureLineColor: [1, 0.85, 0, 1], measureTextColor: [1, 0.85, 0, 1],
    });
    // NiiVue draws no ruler in the radiological convention, in which the field of view runs to the left.
    const drawRuler = nv.drawRuler.bind(nv);
    nv.drawRuler = () => {
      const slices = nv.screenSlices;
      nv.screenSlices = slices.map((slice) => ({ ...slice, fovMM: Array.from(slice.fovMM, Math.abs) }));
      drawRuler();
      nv.screenSlices = slices;
    };
    // NiiVue focuses the canvas at every click; if the page scrolled, it would move during a measurement.
    canvas.focus = () => HTMLElement.prototype.focus.call(canvas, { preventScroll: true });
    await nv.attachToCanvas(canvas);
    Object.assign(planes, {
      all: nv.sliceTypeMultiplanar, axial: nv.sliceTypeAxial, coronal: nv.sliceTypeCoronal,
      sagittal: nv.sliceTypeSagittal, render: nv.sliceTypeRender,
    });
    nv.onMeasurementCompleted = ({ distance }) => measured(distance);
    nv.onLocationChange = (place) => told({ mm: Array.from(place.mm).slice(0, 3), hu: place.values[0] && place.values[0].value });
  }

  // Drawn once, in its window.
  async function show(buffer, low, high) {
    nv.clearMeasurements();
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
  function at() { return Array.from(nv.frac2mm(nv.scene.crosshairPos)).slice(0, 3); }
  function step(x, y, z) { nv.moveCrosshairInVox(x, y, z); }
  function picture() { nv.drawScene(); return nv.canvas.toDataURL("image/png"); }

  return { load, start, show, overlay, view, range, ruler, to, at, step, picture };
})();
