// Light, dark, or as the system has it; the choice is remembered where the browser allows that.
import { need, say } from "./dom";

const ORDER = ["auto", "light", "dark"] as const;
type Theme = (typeof ORDER)[number];
const KEY = "polystage-theme";

function remembered(): Theme {
  try {
    const value = localStorage.getItem(KEY);
    return ORDER.find((theme) => theme === value) ?? "auto";
  } catch {
    return "auto";
  }
}

/** Wires the button; `changed` is called whenever colours are others. */
export function startTheme(changed: () => void): void {
  let theme = remembered();
  const button = need("theme");
  const apply = () => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    say(button, `Theme: ${theme}`);
  };
  button.onclick = () => {
    theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length];
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // A browser that keeps nothing still shows it until the page is left.
    }
    apply();
    changed();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  apply();
}
