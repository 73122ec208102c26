// What a reader does with the report; a test runs this in the page and looks at the results.
{
const seen = [];
const key = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const tabs = [...document.querySelectorAll('[role="tab"]')];
const chosen = () => tabs.findIndex((t) => t.getAttribute("aria-selected") === "true");
const panels = () => [...document.querySelectorAll('[role="tabpanel"]')].filter((p) => !p.hidden).length;
const start = chosen();
seen.push(`panels ${panels()}`, `open ${tabs[start].textContent.trim().split("\n")[0].trim()}`);
tabs[start].focus();
key(tabs[start], "Home"); seen.push(`home ${chosen()} ${document.activeElement === tabs[0]} ${panels()}`);
key(tabs[0], "ArrowRight"); seen.push(`right ${chosen()}`);
key(tabs[1], "End"); seen.push(`end ${chosen() === tabs.length - 1}`);
seen.push(`stops ${tabs.filter((t) => t.tabIndex === 0).length}`);
const memory = document.querySelector("#memory-picture");
key(memory, "Home"); const first = document.querySelector("#readout").textContent;
key(memory, "End"); const last = document.querySelector("#readout").textContent;
seen.push(`memory ${first.split(":")[0]} | ${last.split(":")[0]}`);
key(document.body, "/"); seen.push(`filter ${document.activeElement.type}`);
const filter = document.querySelector('[data-filters="gradient-table"]');
filter.value = "blocks.*.2.bias"; filter.dispatchEvent(new Event("input"));
seen.push(`rows ${document.querySelector("#gradient-table-count").textContent}`);
const fold = document.querySelector("#saved-table .fold");
const members = () => [...fold.closest("tbody").querySelectorAll(".members")].filter((r) => getComputedStyle(r).display !== "none").length;
const folded = members(); fold.click(); seen.push(`fold ${folded} ${members() > 1}`);
document.activeElement.blur(); const before = getComputedStyle(document.body).backgroundColor;
document.activeElement.blur(); key(document.body, "t"); seen.push(`theme ${before !== getComputedStyle(document.body).backgroundColor}`);
seen.push(`page ${document.documentElement.scrollWidth <= document.documentElement.clientWidth}`);
document.body.setAttribute("data-seen", seen.join(";"));
}
