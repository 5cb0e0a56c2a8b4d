// Hands a file to the person at the browser.
export function download(name: string, type: string, content: BlobPart): void {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  // The browser reads it after the click; until then the address must live.
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
