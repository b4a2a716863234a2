// The scan in NiiVue. Everything that knows NiiVue is in this file.
"use strict";

const viewer = (() => {
  let nv = null;
  let told = () => {};
  const planes = {};

  async function start(canvas, onPlace) {
    told = onPlace;
    nv = new niivue.Niivue({
      backColor: [0, 0, 0, 1], show3Dcrosshair: true, crosshairColor: [1, 0.85, 0, 0.8], crosshairWidth: 1, crosshairWidthUnit: "mm", crosshairGap: 8,
      isRadiologicalConvention: true, isOrientationTextVisible: true, isRuler: true, rulerWidth: 3, rulerColor: [1, 1, 1, 0.9], showAllOrientationMarkers: true, loadingText: "", logLevel: "error",
      multiplanarForceRender: false, multiplanarShowRender: niivue.SHOW_RENDER.NEVER, fontColor: [1, 1, 1, 1], dragAndDropEnabled: false, sagittalNoseLeft: true, fontSizeScaling: 0.7,
    });
    await nv.attachToCanvas(canvas);
    Object.assign(planes, {
      all: nv.sliceTypeMultiplanar, axial: nv.sliceTypeAxial, coronal: nv.sliceTypeCoronal,
      sagittal: nv.sliceTypeSagittal, render: nv.sliceTypeRender,
    });
    nv.onLocationChange = (place) => told({ mm: Array.from(place.mm).slice(0, 3), hu: place.values[0] && place.values[0].value });
  }

  // Drawn once, in its window.
  async function show(buffer, low, high) {
    while (nv.volumes.length) nv.removeVolumeByIndex(0);
    await nv.addVolumeFromUrl({ url: "scan.nii.gz", name: "scan.nii.gz", buffer, colormap: "gray", cal_min: low, cal_max: high });
    nv.createOnLocationChange();
  }

  // A map over the scan, or none.
  async function overlay(buffer, low, high) {
    while (nv.volumes.length > 1) nv.removeVolumeByIndex(1);
    if (!buffer) return nv.volumes.length && nv.updateGLVolume();
    await nv.addVolumeFromUrl({ url: "map.nii.gz", name: "map.nii.gz", buffer, colormap: "inferno", opacity: 0.45, cal_min: low, cal_max: high });
  }

  function view(name) { nv.setSliceType(planes[name]); }
  function range(low, high) { const scan = nv.volumes[0]; scan.cal_min = low; scan.cal_max = high; nv.updateGLVolume(); }
  function ruler(on) { nv.opts.dragMode = on ? nv.dragModes.measurement : nv.dragModes.contrast; nv.opts.dragModePrimary = nv.opts.dragMode; nv.drawScene(); }
  function to(mm) { nv.scene.crosshairPos = nv.mm2frac(mm); nv.drawScene(); nv.createOnLocationChange(); }
  function at() { return Array.from(nv.frac2mm(nv.scene.crosshairPos)).slice(0, 3); }
  function step(x, y, z) { nv.moveCrosshairInVox(x, y, z); }
  function picture() { nv.drawScene(); return nv.canvas.toDataURL("image/png"); }

  return { start, show, overlay, view, range, ruler, to, at, step, picture };
})();
