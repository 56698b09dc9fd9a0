// Looks at pages of the documentation (SITE_PAGES="tune api" for others), and searches it.
const {audit, folder, main} = require("./browser.cjs");
const PAGES = (process.env.SITE_PAGES || "index steer models row cli http").split(" ");

async function look(page, problems, window, name) {
  const root = page.url(), pages = {};
  for (const each of PAGES) {
    await page.goto(`${root}${each}.html`);
    await page.screenshot({path: `${folder}/${each}-${name}.png`});
    pages[each] = {title: await page.title(), ...await audit(page)};
  }
  await page.goto(`${root}search.html?q=speculation`);
  await page.waitForSelector("#search-results li a");
  return {problems, pages, found: await page.$$eval("#search-results li a", all => all.map(link => link.textContent))};
}

main(look);
