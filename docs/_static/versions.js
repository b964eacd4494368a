// The versions that are published beside this one, as a menu, and a note in pages of any but the newest release.
"use strict";
document.addEventListener("DOMContentLoaded", async () => {
  const place = document.querySelector(".versions");
  // A page opened from a disk has no versions beside it.
  if (!place || !location.protocol.startsWith("http")) return;
  const here = place.dataset.version;
  const root = new URL(document.documentElement.dataset.content_root, location.href);
  let published;
  try {
    const answer = await fetch(new URL("../versions.json", root));
    if (!answer.ok) return;
    published = await answer.json();
  } catch {
    return;
  }
  // The same page of another version; its first page, if it has no such page.
  const go = async (folder) => {
    const there = new URL(`../${folder}/`, root);
    const same = new URL(location.href.slice(root.href.length), there);
    const found = await fetch(same, { method: "HEAD" }).catch(() => null);
    location.href = found && found.ok ? same : there;
  };
  const menu = document.createElement("select");
  menu.setAttribute("aria-label", "Version");
  for (const { folder, name } of published.versions) {
    menu.add(new Option(name, folder, false, folder === here));
  }
  menu.addEventListener("change", () => go(menu.value));
  place.replaceChildren(menu);
  if (!published.stable || here === published.stable) return;
  const note = document.createElement("div");
  note.className = "versions-note";
  note.setAttribute("role", "note");
  note.append(here === "dev" ? "This version is not released yet. " : "This is an older version. ");
  const link = document.createElement("a");
  link.href = new URL("../stable/", root);
  link.textContent = `Read about ${published.stable}`;
  link.addEventListener("click", (event) => {
    event.preventDefault();
    go("stable");
  });
  note.append(link, ".");
  document.querySelector("article")?.prepend(note);
});
