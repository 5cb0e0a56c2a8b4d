// What a run leaves: a link, the model, the trace of a step; and the check of the kernels.
import type { Client } from "./client";
import { need, say } from "./dom";
import { download } from "./download";
import { whole } from "./format";
import { notice } from "./notices";
import type { Settings } from "./protocol";
import { MOST_LINKED_TEXT, write } from "./settings";

export interface Extra {
  client: Client;
  step(): number;
  wanted(): Settings | null;
  /** Whether it went well; if not, the page has told it. */
  attempt(act: () => Promise<void>): Promise<boolean>;
}

/** Of the check of the kernels, while it is under way. */
export function drawChecked(done: number, all: number): void {
  const bar = need<HTMLProgressElement>("checked");
  bar.max = all;
  bar.value = done;
  say(need("checked-words"), `${whole(done)} of ${whole(all)} kinds of input`);
}

export function wireExtras(extra: Extra): void {
  const words = need("keep-words");

  const save = async (begin: string, act: () => Promise<void>, done: string) => {
    say(words, begin);
    say(words, (await extra.attempt(act)) ? done : "That did not work; the message at the top says why.");
  };
  need("download-model").onclick = () =>
    save(
      "Fetching the weights from the devices.",
      async () => {
        const zip = await extra.client.model();
        download(`polystage-step-${extra.step()}.zip`, "application/zip", zip as Uint8Array<ArrayBuffer>);
      },
      "Saved: a folder for Hugging Face's tools, as a zip file.",
    );
  need("download-trace").onclick = () =>
    save(
      "Writing the trace.",
      async () => download(`polystage-step-${extra.step()}.json`, "application/json", await extra.client.trace()),
      "Saved: it opens at ui.perfetto.dev.",
    );

  let checking = false;
  const check = (on: boolean) => {
    checking = on;
    need("checking").hidden = !on;
    say(need("verify"), on ? "Stop checking" : "Check every kernel here");
  };
  need("verify").onclick = async () => {
    if (checking) return void extra.attempt(() => extra.client.stop());
    check(true);
    say(need("checked-words"), "");
    say(words, "Every kernel runs on every kind of input, and is compared with a reference in 64-bit floats.");
    const good = await extra.attempt(async () => {
      const { kernels, cases, failures, stopped } = await extra.client.verify();
      const outcome =
        failures.length === 0
          ? "all within their tolerance"
          : `${failures.length} outside their tolerance: ${failures.slice(0, 3).join("; ")}`;
      say(words, `${stopped ? "Stopped. " : ""}${whole(kernels)} kernels in ${whole(cases)} cases: ${outcome}.`);
    });
    if (!good) say(words, "That did not work; the message at the top says why.");
    check(false);
  };

  need("copy-link").onclick = async () => {
    const settings = extra.wanted();
    if (settings === null) return;
    history.replaceState(null, "", write(settings));
    if (settings.task === "text" && settings.text.length > MOST_LINKED_TEXT) {
      notice({
        subject: "link",
        title: "The link has all settings but your text.",
        text: "The text is too long for an address.",
      });
    }
    const link = need("copy-link");
    try {
      await navigator.clipboard.writeText(location.href);
      say(link, "Copied");
    } catch {
      say(link, "In the address bar");
    }
    setTimeout(() => say(link, "Copy link"), 2000);
  };
}
