// Messages above the settings: what failed and what can be done about it. One for each subject; a new one takes its place.
import { make, need } from "./dom";

export interface Notice {
  subject: string;
  title: string;
  text?: string;
  steps?: { title: string; steps: string }[];
  actions?: { words: string; act: () => void; id?: string }[];
  bad?: boolean;
}

const shown = new Map<string, HTMLElement>();

export function dismiss(subject: string): void {
  shown.get(subject)?.remove();
  shown.delete(subject);
}

export function notice({ subject, title, text, steps, actions = [], bad = false }: Notice): void {
  const close = make(
    "button",
    { type: "button", class: "close", "aria-label": "Dismiss this message", onclick: () => dismiss(subject) },
    "×",
  );
  const element = make(
    "div",
    { class: bad ? "notice bad" : "notice", "data-subject": subject },
    close,
    make("strong", {}, title),
  );
  if (text) element.append(make("p", {}, text));
  if (steps)
    element.append(
      make("dl", {}, ...steps.flatMap((step) => [make("dt", {}, step.title), make("dd", {}, step.steps)])),
    );
  if (actions.length > 0) {
    const buttons = actions.map(({ words, act, id }) => {
      const press = () => {
        dismiss(subject);
        // The button is gone; the keyboard goes on from the most likely next one.
        need("train").focus({ preventScroll: true });
        act();
      };
      return make("button", { type: "button", id: id ?? null, onclick: press }, words);
    });
    element.append(make("div", { class: "actions" }, ...buttons));
  }
  shown.get(subject)?.remove();
  shown.set(subject, element);
  need("notices").append(element);
}
