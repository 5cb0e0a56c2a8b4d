// What the model can do: examples with right and wrong marks, or what it writes.
import { make, need, say } from "./dom";
import { percent } from "./format";
import type { Shown } from "./protocol";

const ROWS = 8;

export class ShownView {
  private task = "";

  /** What is to come, before it is there. */
  open(task: string): void {
    this.task = task;
    need("accuracy-chart").hidden = task === "text";
    say(
      need("shown-words"),
      task === "text"
        ? "Every few seconds the model writes on from nothing. At first that is noise."
        : "Every few seconds it is asked what it has never seen in training.",
    );
    need("shown").replaceChildren(this.placeholder());
  }

  private placeholder(): HTMLElement {
    return this.task === "text"
      ? make("pre", { class: "sample" }, "")
      : make("ol", { class: "examples" }, ...Array.from({ length: ROWS }, () => make("li", { class: "empty" }, "·")));
  }

  update(shown: Shown): void {
    if (shown.accuracy !== null) {
      say(
        need("shown-words"),
        `At step ${shown.step}, ${percent(shown.accuracy)} of ${shown.asked} questions that it has never seen in training were right.`,
      );
    } else say(need("shown-words"), `This is what it writes at step ${shown.step}.`);
    if (shown.text !== "") {
      need("shown").replaceChildren(make("pre", { class: "sample" }, shown.text));
      return;
    }
    if (shown.examples.length === 0) return;
    // What a model that knows nothing yet writes may not be letters at all.
    const visible = (answer: string) => answer.replace(/[\p{C}\ufffd]/gu, "·");
    const rows = shown.examples.slice(0, ROWS).map(({ question, answer, right }) => {
      const good = answer === right;
      return make(
        "li",
        { class: good ? "right" : "wrong" },
        make("span", { class: "mark", "aria-label": good ? "right" : "wrong" }, good ? "✓" : "✗"),
        make("code", {}, `${question} ${question.includes("+") ? "=" : "→"} `, make("b", {}, visible(answer))),
        make("small", {}, good ? "" : `right: ${right}`),
      );
    });
    need("shown").replaceChildren(make("ol", { class: "examples" }, ...rows));
  }
}
