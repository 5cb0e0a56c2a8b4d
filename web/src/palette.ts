// What each kind of action and each cause of idle time looks like: on the canvas and in the legend the same. Every kind has a
// letter and every cause a hatching of its own, so that nothing is told by colour alone.
import type { Gap, Span } from "./protocol";

export interface Paint {
  fill: string;
  ink: string;
}

export interface Palette {
  kinds: Record<Span["kind"], Paint>;
  ink: string;
  soft: string;
  line: string;
  lane: string;
  hatch: string;
  focus: string;
  surface: string;
}

const VARIABLES: Record<Span["kind"], string> = {
  forward: "f",
  backward: "b",
  "backward, input": "i",
  "backward, weights": "w",
  optimizer: "u",
  copy: "c",
  host: "c",
};

/** The colours of the style sheet in force. */
export function palette(): Palette {
  // A property alone is text ("light-dark(...)"); as somebody's colour it is the one in force.
  const probe = document.body.appendChild(document.createElement("i"));
  const value = (name: string) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const kinds = Object.fromEntries(
    Object.entries(VARIABLES).map(([kind, name]) => [kind, { fill: value(name), ink: value(`${name}-ink`) }]),
  ) as Palette["kinds"];
  const colours = {
    kinds,
    ink: value("ink"),
    soft: value("soft"),
    line: value("line"),
    lane: value("lane"),
    hatch: value("hatch"),
    focus: value("focus"),
    surface: value("surface"),
  };
  probe.remove();
  return colours;
}

const TILE = 8;

/** The lines of a cause in one tile; opposite edges meet. */
function strokes(cause: Gap["cause"]): [number, number, number, number][] {
  switch (cause) {
    case "warm-up":
      return [
        [-1, TILE + 1, TILE + 1, -1],
        [-1, 1, 1, -1],
        [TILE - 1, TILE + 1, TILE + 1, TILE - 1],
      ];
    case "drain":
      return [
        [-1, -1, TILE + 1, TILE + 1],
        [TILE - 1, -1, TILE + 1, 1],
        [-1, TILE - 1, 1, TILE + 1],
      ];
    case "imbalance": // dots
      return [
        [1, 2, 3, 2],
        [TILE / 2 + 1, TILE / 2 + 2, TILE / 2 + 3, TILE / 2 + 2],
      ];
    case "link":
      return [[TILE / 2, 0, TILE / 2, TILE]];
    case "host":
      return [[0, TILE / 2, TILE, TILE / 2]];
  }
}

/** A repeating hatching for a canvas of so many pixels a unit. */
export function hatching(
  context: CanvasRenderingContext2D,
  cause: Gap["cause"],
  colour: string,
  ratio: number,
): CanvasPattern | string {
  const tile = document.createElement("canvas");
  tile.width = tile.height = Math.round(TILE * ratio);
  const inner = tile.getContext("2d");
  if (inner === null) return colour;
  inner.scale(tile.width / TILE, tile.height / TILE);
  inner.strokeStyle = colour;
  inner.lineWidth = cause === "imbalance" ? 2 : 1;
  inner.beginPath();
  for (const [x0, y0, x1, y1] of strokes(cause)) {
    inner.moveTo(x0, y0);
    inner.lineTo(x1, y1);
  }
  inner.stroke();
  const pattern = context.createPattern(tile, "repeat");
  if (pattern === null) return colour;
  pattern.setTransform(new DOMMatrix().scale(TILE / tile.width, TILE / tile.height));
  return pattern;
}
