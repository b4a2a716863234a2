// Gestures on the viewer. One finger is the mouse: it moves the crosshair, turns the rendering, measures. Two fingers
// scroll through slices when they move together, and zoom when they move apart. NiiVue's own touch misses a short tap,
// scrolls slices on a pinch and resets the window during a long drag, so no touch reaches it.
"use strict";

const gestures = (() => {
  const TREMBLE = 8;     // a finger that moves less, in CSS pixels, taps
  const PER_SLICE = 12;  // pixels that two fingers move for one slice

  function listen(canvas, { scroll, zoom, pan }) {
    let finger = null;   // where one finger landed, until it moves
    let pressed = false; // whether the finger acts as a pressed mouse
    let pair = null;     // two fingers: where they were, and what they do

    const mouse = (kind, at) => canvas.dispatchEvent(new MouseEvent(kind, {
      bubbles: true, cancelable: true, view: window, button: 0, buttons: kind === "mouseup" ? 0 : 1, clientX: at.x, clientY: at.y,
    }));
    const pointOf = (one) => ({ x: one.clientX, y: one.clientY });
    const spanOf = ([one, other]) => ({
      x: (one.clientX + other.clientX) / 2, y: (one.clientY + other.clientY) / 2,
      apart: Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY),
    });
    function release(at) {
      if (pressed) mouse("mouseup", at);
      pressed = false;
    }
    function press(at) {
      if (!pressed) mouse("mousedown", at);
      pressed = true;
    }

    function begin({ touches }) {
      if (touches.length === 1) finger = pointOf(touches[0]);
      else {
        release(pointOf(touches[0]));
        finger = null;
        pair = touches.length === 2 ? { ...spanOf(touches), does: null } : null;
      }
    }

    function move({ touches }) {
      if (pair && touches.length === 2) return moveTwo(spanOf(touches));
      if (touches.length !== 1 || pair) return;
      const at = pointOf(touches[0]);
      if (!pressed && finger && Math.hypot(at.x - finger.x, at.y - finger.y) < TREMBLE) return;
      if (finger) press(finger);
      finger = null;
      if (pressed) mouse("mousemove", at);
    }

    function moveTwo(now) {
      const together = Math.hypot(now.x - pair.x, now.y - pair.y), apart = Math.abs(now.apart - pair.apart);
      pair.does ??= Math.max(together, apart) < TREMBLE ? null : together > apart ? "scroll" : "zoom";
      if (pair.does === "scroll") {
        const slices = Math.trunc((pair.y - now.y) / PER_SLICE);
        if (slices) scroll(slices, now);
        pair.y -= slices * PER_SLICE;
      } else if (pair.does === "zoom") {
        pan(pair, now);
        zoom(now.apart / Math.max(1, pair.apart), now);
        Object.assign(pair, now);
      }
    }

    function end({ touches, changedTouches }) {
      if (touches.length) return;
      const at = pointOf(changedTouches[0]);
      if (finger) press(finger);
      release(at);
      finger = pair = null;
    }

    for (const [kind, act] of Object.entries({ touchstart: begin, touchmove: move, touchend: end, touchcancel: end })) {
      canvas.addEventListener(kind, (event) => { event.preventDefault(); event.stopImmediatePropagation(); act(event); }, { capture: true, passive: false });
    }
    // A trackpad's pinch arrives as a wheel with the Ctrl key.
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      event.stopImmediatePropagation();
      zoom(Math.exp(-event.deltaY / 200), { x: event.clientX, y: event.clientY });
    }, { capture: true, passive: false });
  }

  return { listen };
})();
